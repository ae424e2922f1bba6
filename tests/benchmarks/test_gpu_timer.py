"""How calls are timed, on a device whose clock the calls themselves move."""

from collections.abc import Iterator
from contextlib import contextmanager

import gpu_timer
import pytest
import torch
from gpu_timer import Contender, Graphed, WallClock, clock_of, turns

from biper_engine.bench import Budget


class Device:
    """A device on which calls queue up: time passes for a mark when the work before it is done."""

    def __init__(self) -> None:
        self.done_s = 0.0
        self.calls: list[str] = []
        self.waits = 0

    def call(self, name: str, seconds: float) -> None:
        self.calls.append(name)
        self.done_s += seconds

    def mark(self) -> float:
        return self.done_s

    def elapsed_s(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        self.waits += 1


FIVE_TURNS = Budget(seconds=0, fewest=5, most=5, warmup=0)


def test_throughput_is_device_time_of_a_call_and_turns_alternate() -> None:
    device = Device()
    contenders = [
        Contender(name="fast", call=lambda: device.call("fast", 0.001)),
        Contender(name="slow", call=lambda: device.call("slow", 0.01)),
    ]
    taken = turns(contenders, device, FIVE_TURNS, turn_s=0.02, alone=2)
    assert taken["fast"].throughput.ms == pytest.approx([1.0] * 5)
    assert taken["slow"].throughput.ms == pytest.approx([10.0] * 5)
    assert len(taken["fast"].latency.ms) == 10
    order = [name for i, name in enumerate(device.calls) if device.calls[i - 1] != name]
    assert order == ["fast", "slow"] * 6  # to warm up, then five turns


def test_a_turn_makes_as_many_calls_as_fill_its_time() -> None:
    device = Device()
    fast = Contender(name="fast", call=lambda: device.call("fast", 0.001))
    turns([fast], device, FIVE_TURNS, turn_s=0.02, alone=1)
    counted = device.calls.count("fast")
    warmup = 3 + sum((1, 2, 4, 8))
    assert counted == warmup + 5 * (1 + 20 + 1)


def test_a_call_that_does_its_work_many_times_is_divided_by_them() -> None:
    device = Device()
    many = Contender(name="many", call=lambda: device.call("many", 0.01), repeats=10)
    taken = turns([many], device, FIVE_TURNS)
    assert taken["many"].throughput.median_ms == pytest.approx(1.0)


def test_what_is_around_a_contestant_is_around_its_turns_alone() -> None:
    device, forced = Device(), []

    @contextmanager
    def around() -> Iterator[None]:
        forced.append(True)
        try:
            yield
        finally:
            forced.pop()

    seen: dict[str, set[bool]] = {"inside": set(), "outside": set()}

    def call(name: str) -> None:
        seen[name].add(bool(forced))
        device.call(name, 0.001)

    contenders = [
        Contender(name="inside", call=lambda: call("inside"), around=around),
        Contender(name="outside", call=lambda: call("outside")),
    ]
    turns(contenders, device, FIVE_TURNS)
    assert seen == {"inside": {True}, "outside": {False}}


def test_nothing_is_under_way_when_a_call_is_timed_on_its_own() -> None:
    device = Device()
    one = Contender(name="one", call=lambda: device.call("one", 1.0))
    turns([one], device, FIVE_TURNS, turn_s=0.02, alone=3)
    assert device.waits >= 5 * 3 * 2


def test_values_hold_medians_and_quartiles() -> None:
    device = Device()
    one = Contender(name="one", call=lambda: device.call("one", 0.004))
    values = turns([one], device, FIVE_TURNS)["one"].to_dict()
    assert values["throughput_ms"] == pytest.approx(4.0)
    assert values["throughput_quartiles_ms"] == pytest.approx([4.0, 4.0])
    assert len(values["throughput_samples_ms"]) == 5
    assert values["latency_ms"] >= 0


def test_on_a_cpu_what_would_be_captured_is_called() -> None:
    calls = []
    graphed = Graphed(lambda: calls.append(1), 7, torch.device("cpu"))
    assert calls == []
    graphed()
    assert len(calls) == graphed.repeats == 7


def test_the_clock_is_the_device_s() -> None:
    assert isinstance(clock_of(torch.device("cpu")), WallClock)
    assert isinstance(clock_of(torch.device("cuda")), gpu_timer.CudaClock)
