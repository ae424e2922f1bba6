"""The examples run, with little work."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def program(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


@pytest.mark.deep
def test_the_network_of_reactnets_kind_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason='pip install "biper-engine[train]"')
    with torch.random.fork_rng():
        program("reactnet.py")["main"](1, str(tmp_path / "reactnet.biper"), images_used=256)
    printed = capsys.readouterr().out
    assert "4 of 6 layers packed" in printed
    assert "of 500 test images are right" in printed


@pytest.mark.deep
def test_the_detector_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        program("detector.py")["main"](2)
    printed = capsys.readouterr().out
    assert "3 of 4 layers packed" in printed
    assert "overlap with the true box" in printed


@pytest.mark.deep
def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning", reason='pip install "biper-engine[train]"')
    from tests.training.few_images import few_images

    notebook = json.loads((EXAMPLES / "digits.ipynb").read_text("utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("epochs=3", "epochs=1")
            with few_images():
                exec(compile(source, "examples/digits.ipynb", "exec"), names)
    assert "18 of 20 layers packed" in capsys.readouterr().out
