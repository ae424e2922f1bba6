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


def printed() -> str:
    """Return the text that stands in README as the end of what the example prints."""
    _, _, after = README.read_text("utf-8").partition(example())
    match = re.search(r"^```text\n(.*?)^```$", after, re.MULTILINE | re.DOTALL)
    assert match is not None
    return match[1]


def without_rounding(text: str) -> str:
    """Leave out float errors, which depend on the processor."""
    return re.sub(r"\d\.\d+e-\d+", "...", text)


def test_the_example_is_short() -> None:
    assert len([line for line in example().splitlines() if line.strip()]) <= 15


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    names: dict[str, object] = {}
    exec(compile(example(), str(README), "exec"), names)
    assert torch.equal(torch.get_rng_state(), before)
    out = capsys.readouterr().out
    assert "18 of 20 layers packed" in out
    assert without_rounding(out).endswith("\n" + without_rounding(printed()))
    assert "top-1 agreement 100.00%" in printed()
    assert (tmp_path / "digits.biper").exists()


def test_the_table_of_speed_is_that_of_the_recorded_results() -> None:
    tables = runpy.run_path(str(README.parent / "benchmarks/tables.py"))
    assert tables["in_readme"]() in README.read_text("utf-8")


def test_the_sentence_on_equal_accuracy_is_that_of_the_recorded_result() -> None:
    assert sentence(Result.read()) in " ".join(README.read_text("utf-8").split())
