import pytest
import torch

from biper_engine.bench import common_threads, torch_threads
from biper_engine.ops import cpu_threads
from biper_engine.ops.backends import backends

CPU = {info.name: info.available for info in backends()}["cpu"]
needs_cpu = pytest.mark.skipif(not CPU, reason="no cpu backend here")


@pytest.fixture(autouse=True)
def _no_number_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIPER_NUM_THREADS", raising=False)


def test_torchs_threads_are_restored_also_after_an_error() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), torch_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before
    with torch_threads(None):
        assert torch.get_num_threads() == before


@needs_cpu
def test_the_default_is_what_the_engine_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert common_threads(None) == cpu_threads.thread_count()
    monkeypatch.setenv("BIPER_NUM_THREADS", "7")
    assert common_threads(None) == 7


def test_one_thread_is_always_possible() -> None:
    assert common_threads(1) == 1


@needs_cpu
def test_more_threads_than_the_engine_may_use_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "thread_count", lambda: min(2, torch.get_num_threads()))
    before = torch.get_num_threads()
    assert common_threads(2) == 2
    with pytest.raises(ValueError, match=r"3 threads .* may use 2 processors.* 2 or fewer"):
        common_threads(3)
    assert torch.get_num_threads() == before


def test_a_number_that_the_environment_contradicts_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BIPER_NUM_THREADS", "3")
    with pytest.raises(ValueError, match=r"2 threads .* but BIPER_NUM_THREADS=3 gives the engine"):
        common_threads(2)


def test_a_number_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`threads` \(=0\) must be 1 or more"):
        common_threads(0)
