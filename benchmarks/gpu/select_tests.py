"""A pytest plugin: selects the tests of one backend on the GPU, and records results by file.

Variables: `BIPER_GPU_BACKEND`, the backend, `BIPER_GPU_UNDER`, a checking tool, and `OUT`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

from gpu.record import append

REHEARSAL = "BIPER_GPU_STAND_IN" in os.environ  # on the emulator, a few tests of each file
FEW = 3
_found: dict[str, dict[str, Any]] = {}


def is_of(item: pytest.Item, backend: str, *, rehearsal: bool = REHEARSAL) -> bool:
    """Return whether a test runs on a backend on the GPU.

    This depends on its fixtures' values, not its name: "cuda" is a backend and also a device.
    """
    parameters = getattr(item, "callspec", None)
    given = parameters.params if parameters is not None else {}
    if "run" in given:
        name, device, isa = given["run"]
        wanted = (backend, "cpu" if rehearsal else "cuda")
        return bool((name, device) == wanted and isa in (None, "90"))
    if item.get_closest_marker("gpu") is not None or "cuda" in given:
        asked = given.get("cuda", "gpu")
        return backend == "cuda" and bool(asked == ("emulated" if rehearsal else "gpu"))
    return False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backend = os.environ["BIPER_GPU_BACKEND"]
    kept = [item for item in items if is_of(item, backend)][: FEW if REHEARSAL else None]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Record a file's results so far, so that a kill loses only the running test."""
    result = yield
    file = item.location[0]
    done = nextitem is None or nextitem.location[0] != file
    whose = {"backend": os.environ["BIPER_GPU_BACKEND"], "under": os.environ["BIPER_GPU_UNDER"]}
    append("tests", file=file, **whose, done=done, **_found[file])
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = report.location[0]
    found = _found.setdefault(file, {"passed": 0, "failed": [], "skipped": Counter()})
    if report.failed:
        found["failed"].append(report.nodeid.partition("::")[2])
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "no reason given"
        found["skipped"][reason.removeprefix("Skipped: ")] += 1
    elif report.when == "call":
        found["passed"] += 1
