"""The README's example, run unchanged, and its figures, compared with the measurements."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from frontier_report import sentence
from frontier_result import Result

README = Path(__file__).resolve().parent.parent / "README.md"


def example() -> str:
    match = re.search(
        r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert match is not None
    return match[1]


def test_the_example_is_short() -> None:
    assert len([line for line in example().splitlines() if line.strip()]) <= 15


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(example(), str(README), "exec"), names)
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (4, 10)
    assert "18 of 20 layers packed" in capsys.readouterr().out
    assert (tmp_path / "resnet20.biper").exists()


def test_the_table_of_speed_is_that_of_the_recorded_results() -> None:
    tables = runpy.run_path(str(README.parent / "benchmarks/tables.py"))
    assert tables["in_readme"]() in README.read_text("utf-8")


def test_the_sentence_on_equal_accuracy_is_that_of_the_recorded_result() -> None:
    assert sentence(Result.read()) in " ".join(README.read_text("utf-8").split())
