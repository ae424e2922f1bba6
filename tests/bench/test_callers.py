import threading

import pytest
import torch
from torch import Tensor

from biper_engine import use_backend
from biper_engine.bench import callers as module
from biper_engine.bench import torch_threads
from biper_engine.bench.callers import Callers, paced
from biper_engine.ops.backends import forced_name


class Clock:
    """A clock that the calls themselves move on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("begin", "end", "takes", "rate"),
    [
        (1.0, 3.0, 0.25, 4.0),
        (1.0, 3.0, 0.75, 1 / 0.75),  # no call ends at 1 or at 3: none is counted in part
        (0.0, 0.0, 2.0, 0.5),  # one call counts at least
    ],
)
def test_whole_calls_are_counted(
    monkeypatch: pytest.MonkeyPatch, begin: float, end: float, takes: float, rate: float
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "perf_counter", clock)

    def call() -> None:
        clock.now += takes

    assert paced(call, begin, end) == rate
    assert clock.now >= end


def test_calls_before_the_beginning_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "perf_counter", clock)

    def slow_at_first() -> None:
        clock.now += 4.0 if clock.now < 10.0 else 0.5

    assert paced(slow_at_first, 10.0, 14.0) == 2.0


def meeting(count: int) -> list[Tensor]:
    """Return the outputs of calls that only end when all of them have begun."""
    all_here = threading.Barrier(count, timeout=60)

    def call(index: int) -> Tensor:
        all_here.wait()
        return torch.tensor(index)

    return Callers([lambda index=index: call(index) for index in range(count)])()  # type: ignore[misc]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_calls_are_under_way_at_once(count: int) -> None:
    assert [int(output) for output in meeting(count)] == list(range(count))


def test_the_rate_is_that_of_all_threads_together(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def counted(call: object, begin: float, end: float) -> float:
        seen.add(threading.get_ident())
        assert end == begin + 3.0
        return 2.5

    monkeypatch.setattr(module, "paced", counted)
    callers = Callers([lambda: torch.tensor(0)] * 4)
    assert callers.at_once == 4
    assert callers.rate(3.0, 1.0) == 10.0
    assert len(seen) == 4
    assert threading.get_ident() not in seen


def test_a_thread_has_inference_mode_torchs_threads_and_the_forced_backend() -> None:
    def call() -> Tensor:
        assert torch.is_inference_mode_enabled()
        assert forced_name() == "reference"
        return torch.tensor(torch.get_num_threads())

    with torch_threads(1), use_backend("reference"):
        assert [int(output) for output in Callers([call, call])()] == [1, 1]
    assert forced_name() is None


def test_an_error_of_a_call_is_raised() -> None:
    def failing() -> Tensor:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        Callers([lambda: torch.tensor(0), failing])()
