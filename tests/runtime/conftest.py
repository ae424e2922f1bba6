"""Fixtures for tests of plans: a cpu backend, or a skip without one, and a stand-in for a GPU."""

import pytest

from biper_engine.ops.backends import backends
from biper_engine.runtime import plan
from tests.runtime.fake_driver import FakeDriver


@pytest.fixture
def cpu_backend() -> None:
    """Skip where the cpu backend cannot run."""
    if not {info.name: info.available for info in backends()}["cpu"]:
        pytest.skip("no cpu backend here")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Let every engine run on a stand-in for a GPU."""
    made = FakeDriver()
    monkeypatch.setattr(plan, "graph_driver", lambda device: made)
    return made
