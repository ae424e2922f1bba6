"""The pages in docs, held to what the code does and to what was measured."""

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
NETWORKS = DOCS / "networks.md"


def test_the_footprint_is_that_of_the_recorded_result() -> None:
    assert runpy.run_path(str(DOCS / "tables.py"))["footprint"]() in NETWORKS.read_text("utf-8")


def test_a_row_of_the_networks_is_what_converting_finds() -> None:
    tables = runpy.run_path(str(DOCS / "tables.py"))
    assert tables["network"]("cifar10/resnet20_1w1a") in NETWORKS.read_text("utf-8")


@pytest.mark.deep
def test_the_networks_are_what_converting_finds() -> None:
    assert runpy.run_path(str(DOCS / "tables.py"))["networks"]() in NETWORKS.read_text("utf-8")


@pytest.mark.deep
def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = re.search(r"^```python\n(.*?)^```$", NETWORKS.read_text("utf-8"), re.M | re.S)
    assert example is not None
    exec(compile(example[1], str(NETWORKS), "exec"), {})
    assert "16 of 21 layers packed" in capsys.readouterr().out
