"""The step `tests`: everything marked `gpu`, and the operator matrix on the backends for GPUs.

What cannot run since a package is missing is named, and why. A backend on which not one test of the
matrix ran fails the step: skipped is not passed.
"""

from __future__ import annotations

import ast
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from gpu import ROOT
from gpu_budget import Deadline
from gpu_machine import keep, missing, no_gpu, run_folder
from gpu_steps import Group, last_line, python

TESTS = ROOT / "tests"
BACKENDS = ("cuda", "triton")
WORKERS = 8
MATRIX_SHARE = 0.65  # of the time, where there are tests marked `gpu` behind it
# What tests import, as modules, whose absence leaves some out instead of failing all.
OPTIONAL = ("hypothesis", "typer", "rich", "PIL", "sklearn", "lightning", "datasets", "matplotlib")
NEEDED = ("pytest", "safetensors")
# Stands for hypothesis where that is missing: its tests skip, with the reason, and no other.
STAND_IN = """
import pytest


class _Anything:
    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return self


class settings(_Anything):
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, function):
        return function

    register_profile = load_profile = staticmethod(lambda *args, **kwargs: None)


def given(*args, **kwargs):
    return pytest.mark.skip(reason="hypothesis is not installed")


def example(*args, **kwargs):
    return lambda function: function


strategies = HealthCheck = _Anything()
assume = note = target = _Anything()
"""


@dataclass
class Counts:
    """What a run of pytest did.

    Attributes:
        passed, failed: tests.
        skipped: tests by reason.
        ran: tests that ran to their end on a GPU, by backend.
    """

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    ran: Counter[str] = field(default_factory=Counter)


def count(report: str) -> Counts:
    """Read a JUnit report of pytest."""
    found = Counts()
    for case in ElementTree.fromstring(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if skipped is not None:
            found.skipped[skipped.get("message") or "no reason given"] += 1
            continue
        if case.find("failure") is not None or case.find("error") is not None:
            found.failed.append(name)
        else:
            found.passed += 1
        found.ran.update(backends_of(case.get("name") or ""))
    return found


def backends_of(name: str) -> set[str]:
    """Return the backends for GPUs on which a test runs, by the ids of tests/conftest.py.

    "cuda" is a backend or, in "triton-cuda" and "reference-cuda", the device of another;
    "cuda-emulated-90" and "triton-cpu" need no GPU.
    """
    words = ["", *name.partition("[")[2].rstrip("]").split("-"), ""]
    found = set()
    for before, word, after in zip(words, words[1:], words[2:], strict=False):
        on_cuda = word == "cuda" and after != "emulated"
        if on_cuda and before not in ("triton", "reference"):
            found.add("cuda")
        elif on_cuda and before == "triton":
            found.add("triton")
    return found


def imports(path: Path) -> set[str]:
    """Return the top-level names of the modules that a file imports at any place."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def marked(folder: Path) -> list[Path]:
    """Return the test files that have a test marked `gpu`."""
    files = sorted(folder.rglob("test_*.py"))
    return [path for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def collectable(
    files: Iterable[Path], absent: Sequence[str], stood_in: Sequence[str] = ("hypothesis",)
) -> tuple[list[Path], dict[str, str]]:
    """Split files into those that can be imported here, and why others cannot.

    Args:
        files: of tests.
        absent: modules that are not installed.
        stood_in: those of them that something stands in for.
    """
    lost = set(absent) - set(stood_in)
    usable, reasons = [], {}
    for path in files:
        needs = sorted(imports(path) & lost)
        if needs:
            reasons[path.name] = f"it needs {', '.join(needs)}"
        else:
            usable.append(path)
    return usable, reasons


def stand_in(folder: Path) -> str:
    """Write a module that stands for hypothesis and return the folder to import it from."""
    place = folder / "stand_in"
    place.mkdir(exist_ok=True)
    (place / "hypothesis.py").write_text(STAND_IN, encoding="utf-8")
    return str(place)


def pytest_words(report: Path) -> list[str]:
    """Return the arguments of every run."""
    words = ["-m", "pytest", "--no-header", "-q", "-rf", f"--junitxml={report}", "-o"]
    words += ["console_output_style=count", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    if not missing("xdist"):
        words += ["-n", str(WORKERS), "--maxprocesses", str(WORKERS), "--dist", "worksteal"]
    return words


def run(name: str, words: Sequence[str], allowed_s: float, shims: str) -> tuple[Counts, str]:
    """Run pytest; return what it did, and why that does not count, or an empty string.

    Args:
        name: of its log and report.
        words: more arguments.
        allowed_s: seconds after which it is stopped, and its report lost.
        shims: a folder to import from, or an empty string.
    """
    report = run_folder() / f"tests-{name}.xml"
    log = run_folder() / f"tests-{name}.log"
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), shims]))
    group = Group(
        python(*pytest_words(report), *words), log, {"PYTHONPATH": paths, "OMP_NUM_THREADS": "2"}
    )
    try:
        status = group.wait(allowed_s)
    finally:
        group.stop()
    print(f"----- {name}: pytest {' '.join(words)}")
    print(log.read_text(encoding="utf-8", errors="replace").rstrip())
    if status is None:
        return Counts(), f"{name}: stopped after {allowed_s:.0f} s; {last_line(log)}"
    if not report.exists():
        return Counts(), f"{name}: pytest ended with {status}; {last_line(log)}"
    counts = count(report.read_text(encoding="utf-8"))
    if status not in (0, 1, 5):
        return counts, f"{name}: pytest ended with {status}; {last_line(log)}"
    return counts, ""


def verdict(gpu: Counts, matrix: Counts, problems: Sequence[str]) -> tuple[int, str]:
    """Return the exit status of the step, and its line."""
    failed = [*gpu.failed, *matrix.failed]
    parts = [f"{gpu.passed + matrix.passed} passed, {len(failed)} failed"]
    parts += [f"{matrix.ran[name]} of the matrix on {name}" for name in BACKENDS]
    parts += [f"first failed: {failed[0]}"] if failed else []
    idle = [name for name in BACKENDS if not matrix.ran[name]]
    for name in idle:
        reasons = [why for why, _ in matrix.skipped.most_common() if name in why]
        parts.append(f"nothing ran on {name}: {reasons[0] if reasons else 'no test has it'}")
    parts += problems
    return (1 if failed or idle or problems else 0), "; ".join(parts)


def main() -> int:
    reason = no_gpu()
    if reason is not None:
        print(f"no GPU: {reason}")
        return 1
    needed = missing(*NEEDED)
    if needed:
        print(f"not installed: {', '.join(needed)}; no test can run")
        return 1
    absent = missing(*OPTIONAL)
    shims = stand_in(run_folder()) if "hypothesis" in absent else ""
    if shims:
        print("left out: tests of properties, since hypothesis is not installed")
    files, left_out = collectable(marked(TESTS), absent)
    for name, why in left_out.items():
        print(f"left out: {name}, {why}")
    deadline = Deadline.of_step(150)
    allowed_s = deadline.left_s() * (MATRIX_SHARE if files else 1.0)
    chosen = [str(TESTS / "ops"), "-k", " or ".join(BACKENDS)]
    matrix, problem = run("matrix", chosen, allowed_s, shims)
    problems = [problem] if problem else []
    gpu = Counts()
    if files:
        gpu, problem = run("gpu", ["-m", "gpu", *map(str, files)], deadline.left_s(), shims)
        problems += [problem] if problem else []
    for counts in (matrix, gpu):
        for why, number in counts.skipped.most_common():
            print(f"skipped: {number} x {why}")
    keep(
        "tests",
        {
            "passed": gpu.passed + matrix.passed,
            "failed": [*gpu.failed, *matrix.failed],
            "matrix_ran": dict(matrix.ran),
            "skipped": dict(gpu.skipped + matrix.skipped),
            "left_out": left_out | ({"properties": "hypothesis is missing"} if shims else {}),
            "problems": problems,
        },
    )
    status, line = verdict(gpu, matrix, problems)
    print(line)
    return status


if __name__ == "__main__":
    sys.exit(main())
