"""What tests of native programs share: they skip where there is no cpu backend."""

import pytest

from biper_engine.ops.backends import backends


@pytest.fixture
def cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Force no backend, and skip where the cpu backend cannot run."""
    monkeypatch.delenv("BIPER_BACKEND", raising=False)
    if not {info.name: info.available for info in backends()}["cpu"]:
        pytest.skip("no cpu backend here")
