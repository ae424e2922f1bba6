"""How many threads the cpu backend uses."""

from collections.abc import Callable, Iterator

import pytest
import torch

from biper_engine.ops import cpu_threads
from biper_engine.ops.backends import backends
from biper_engine.ops.cgroup import cgroup_limit
from biper_engine.ops.cpu_threads import thread_count

REASON = {info.name: info.reason for info in backends()}["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"cpu: {REASON}")


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_environment_sets_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIPER_NUM_THREADS", "13")
    assert thread_count() == 13
    monkeypatch.setenv("BIPER_NUM_THREADS", "1024")
    assert thread_count() == 1024
    for wrong in ("0", "-2", "two", "1.5", "1025", "2147483647"):
        monkeypatch.setenv("BIPER_NUM_THREADS", wrong)
        with pytest.raises(ValueError, match=f"BIPER_NUM_THREADS .='{wrong}'. must be a positive"):
            thread_count()


def test_a_number_of_threads_of_any_length_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python itself refuses to read more than 4,300 digits, with words of its own."""
    monkeypatch.setenv("BIPER_NUM_THREADS", "1" * 5000)
    with pytest.raises(
        ValueError, match=r"1{40}\.\.\.'. must be a positive integer, 1,024 at most"
    ):
        thread_count()


def test_threads_are_torchs_bounded_by_processors(
    monkeypatch: pytest.MonkeyPatch, torch_threads: Callable[[int], None]
) -> None:
    class Native:
        @staticmethod
        def processors() -> int:
            return 6

    monkeypatch.delenv("BIPER_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu_threads, "native", lambda: Native)
    for torchs, wanted in ((1, 1), (4, 4), (9, 6)):
        torch_threads(torchs)
        assert thread_count() == wanted


def test_processors_are_those_of_this_thread_bounded_by_the_quota() -> None:
    from biper_engine import _cpu

    available = _cpu.processors()
    try:
        for most in (1, available + 1):
            _cpu.limit_processors(most)
            assert _cpu.processors() == min(most, available)
    finally:
        _cpu.limit_processors(cgroup_limit())
