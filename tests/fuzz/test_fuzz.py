"""The fuzzer itself, and a little of it; the weekly test and `python -m tests.fuzz` have more."""

from __future__ import annotations

from pathlib import Path

import pytest

from biper_engine.engine import load
from biper_engine.graph import OPERATORS, operator_of
from tests.fuzz.bases import BASES, write_bases
from tests.fuzz.cases import Cases
from tests.fuzz.judge import judge
from tests.fuzz.runner import Summary, fuzz
from tests.fuzz.worker import run
from tests.native import builds

_FIRST = 1_000_000  # of the long tests; not among those of longer runs by hand


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    write_bases(folder)
    return folder


def test_the_bases_run_and_call_every_operator(folder: Path) -> None:
    called = set()
    for name in BASES:
        assert judge(folder / f"{name}.biper") == {"outcome": "runs"}, name
        nodes = load(folder / f"{name}.biper").graph_module.graph.nodes
        called |= {found.name for found in map(operator_of, nodes) if found is not None}
    assert called == set(OPERATORS)


def test_a_seed_makes_the_same_file_each_time(folder: Path) -> None:
    for seed in range(20):
        assert Cases(folder)[seed] == Cases(folder)[seed]


def test_some_seeds(folder: Path, tmp_path: Path) -> None:
    cases = Cases(folder)
    found = [run(cases, seed, tmp_path / "case.biper") for seed in range(40)]
    assert [line for line in found if "finding" in line] == []
    assert {"refused", "runs"} <= {line["outcome"] for line in found}


def test_findings_are_summed_up() -> None:
    summary = Summary()
    summary.add({"seed": 3, "outcome": "runs", "seconds": 0.1})
    summary.add({"seed": 4, "outcome": "crash", "finding": "crash with status -11: words"})
    assert "1 findings\n  seed 4: crash with status -11: words" in str(summary)


_LENGTHS = [
    pytest.param(400, marks=pytest.mark.deep, id="400 seeds"),
    pytest.param(20_000, marks=pytest.mark.weekly, id="20,000 seeds"),
]


@pytest.mark.parametrize("seeds", _LENGTHS)
def test_seeds(seeds: int) -> None:
    summary = fuzz(_FIRST, seeds, None)
    assert summary.findings == {}, str(summary)
    assert summary.outcomes["runs"] > 0


@pytest.mark.weekly
def test_seeds_under_sanitizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    environment = builds.sanitizer_environment()
    extension = builds.sanitized_cpu_module(tmp_path_factory)
    summary = fuzz(_FIRST, 2_000, None, extension=str(extension), environment=environment)
    assert summary.findings == {}, str(summary)
