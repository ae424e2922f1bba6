"""Times of calls on a device, in turn: how long one takes, and how many a second there are.

Two figures of each contestant, medians of many. *Latency*: wall clock from the call until the
device has finished it, nothing else under way. *Throughput*: the device's own clock over calls that
are made one behind another without waiting. L2 is not flushed between calls; inputs are on the
device, and every call has the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import torch

from biper_engine.bench.timer import Budget, Samples, rounds

__all__ = ["Clock", "Contender", "CudaClock", "Graphed", "Taken", "WallClock", "clock_of", "turns"]


class Clock(Protocol):
    """Marks on a device's time line."""

    def mark(self) -> Any:
        """Note when the work so far is done."""
        ...

    def elapsed_s(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks, once both are reached."""
        ...

    def synchronize(self) -> None:
        """Wait for all work so far."""
        ...


class CudaClock:
    """Events on the current stream of the current device."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_s(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class WallClock:
    """The processor's clock, for calls that have finished when they return."""

    def mark(self) -> float:
        return perf_counter()

    def elapsed_s(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        pass


def clock_of(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else WallClock()


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What is timed.

    Attributes:
        name: of its samples.
        call: puts work on the device.
        around: made anew around each turn, such as a forced backend.
        repeats: how often `call` does what is timed.
    """

    name: str
    call: Callable[[], object]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    repeats: int = 1


@dataclass(frozen=True)
class Taken:
    """Milliseconds that one contestant takes for what is timed, one sample for each turn or call.

    Attributes:
        throughput: device time of a call among others.
        latency: wall clock of a call on its own.
    """

    throughput: Samples
    latency: Samples

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: medians and quartiles, the samples of throughput too."""
        found = {"throughput_ms": self.throughput.median_ms, "latency_ms": self.latency.median_ms}
        for name, samples in (("throughput", self.throughput), ("latency", self.latency)):
            found[f"{name}_quartiles_ms"] = list(samples.quartiles_ms)
        return {**found, "throughput_samples_ms": list(self.throughput.ms)}


@dataclass
class _Samples:
    throughput: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)


def turns(
    contenders: Sequence[Contender],
    clock: Clock,
    budget: Budget,
    *,
    turn_s: float = 0.02,
    alone: int = 5,
) -> dict[str, Taken]:
    """Time contestants in turn, so that a clock that drifts is no one's own.

    A turn: a call that does not count, calls one behind another for about `turn_s`, then some that
    each wait for the one before.

    Args:
        contenders: names differ.
        clock: of the device that they run on.
        budget: `seconds` of all together, `fewest` and `most` turns of each.
        turn_s: seconds of calls without waiting.
        alone: calls with waiting.
    """
    counts = {one.name: _calls(one, clock, turn_s) for one in contenders}
    samples: Mapping[str, _Samples] = {one.name: _Samples() for one in contenders}
    for _ in rounds(budget):
        for one in contenders:
            found, count = samples[one.name], counts[one.name]
            with one.around():
                one.call()
                found.throughput.append(_together(one, clock, count) / count / one.repeats)
                found.latency += [_alone(one, clock) / one.repeats for _ in range(alone)]
    return {name: _taken(found) for name, found in samples.items()}


def _taken(found: _Samples) -> Taken:
    lists = (found.throughput, found.latency)
    return Taken(*(Samples(tuple(1e3 * seconds for seconds in each)) for each in lists))


def _calls(one: Contender, clock: Clock, turn_s: float) -> int:
    """Warm a contestant up, and return how many of its calls take about `turn_s`."""
    with one.around():
        for _ in range(3):
            one.call()
        count, seconds = 1, _together(one, clock, 1)
        while seconds < turn_s / 4 and count < 4096:
            count *= 2
            seconds = _together(one, clock, count)
    return max(1, min(4096, round(count * turn_s / max(seconds, 1e-9))))


def _together(one: Contender, clock: Clock, count: int) -> float:
    clock.synchronize()
    start = clock.mark()
    for _ in range(count):
        one.call()
    return clock.elapsed_s(start, clock.mark())


def _alone(one: Contender, clock: Clock) -> float:
    clock.synchronize()
    start = perf_counter()
    one.call()
    clock.synchronize()
    return perf_counter() - start


class Graphed:
    """A call captured some times over in one CUDA graph, so that launches from Python cost nothing.

    On a CPU it calls as often instead.

    Args:
        call: may be captured: no synchronisation, memory from PyTorch's allocator.
        repeats: how often.
        device: where it runs.

    Raises:
        RuntimeError: the call cannot be captured.
    """

    def __init__(self, call: Callable[[], object], repeats: int, device: torch.device) -> None:
        self.repeats = repeats
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made at first calls must not be in the graph
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(repeats):
                call()

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        for _ in range(self.repeats):
            self._call()
