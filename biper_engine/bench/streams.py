"""Compare images per second: an engine with one caller per core, rivals with several streams."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter, process_time, sleep
from typing import Any

import torch
from torch import Tensor, nn

from biper_engine.bench.callers import Callers, Streams
from biper_engine.bench.comparison import ENGINE, Checked, facts_of
from biper_engine.bench.machine import machine_facts
from biper_engine.bench.rivals import FloatNetworks, Rival, relative_difference, stream_rivals
from biper_engine.bench.threads import common_threads, torch_threads
from biper_engine.bench.timer import Budget, quartiles, rounds
from biper_engine.engine import Engine
from biper_engine.errors import BackendUnavailableError

__all__ = ["SLICES", "Rates", "StreamContest", "Throughput", "throughput"]

SLICES = Budget(seconds=60.0, fewest=3, warmup=0, pause_ms=20.0)
"""Each contestant has at least three slices; a pause lets the previous one's threads sleep."""

_SLICE_SECONDS = 1.0
_WARMUP_SECONDS = 0.2


@dataclass(frozen=True)
class Rates:
    """Images per second, one figure for each slice of time, in order.

    Attributes:
        images_per_second: the figure of each slice.
        processors: processors that this process had in each slice: the CPU time of its threads
            over the wall time. Less than the number of working threads means a busy machine.
    """

    images_per_second: tuple[float, ...]
    processors: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over the slices."""
        return statistics.median(self.images_per_second)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the slices are slower than the first, a quarter faster than the second."""
        return quartiles(self.images_per_second)

    @property
    def processors_used(self) -> float:
        """The median of `processors`."""
        return statistics.median(self.processors)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, every slice included."""
        low, high = self.quartiles
        return {
            "median_images_per_second": self.median,
            "quartile_1_images_per_second": low,
            "quartile_3_images_per_second": high,
            "slices_images_per_second": list(self.images_per_second),
            "processors_used": self.processors_used,
        }


@dataclass(frozen=True, kw_only=True)
class StreamContest(Checked):
    """All contestants at one batch size, which is the number of images in one call.

    Attributes:
        rates: by contestant; "engine" is one of them.
        at_once: calls that each contestant runs at the same time.
        ways: the contestants of each program, such as OpenVINO int8 with one and with two streams.
    """

    rates: dict[str, Rates]
    at_once: dict[str, int]
    ways: dict[str, tuple[str, ...]]

    def best(self) -> dict[str, str]:
        """Return the contestant with the highest median for each program that ran."""
        best = {}
        for program, names in self.ways.items():
            ran = [name for name in names if name in self.rates]
            if ran:
                best[program] = max(ran, key=lambda name: self.rates[name].median)
        return best

    def times_as_fast(self, rival: str) -> float:
        """Return the engine's median over a rival contestant's."""
        return self.rates[ENGINE].median / self.rates[rival].median

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, every slice included."""
        best = self.best()
        return {
            "batch": self.batch,
            "contestants": {
                name: {"calls_at_once": self.at_once[name], **rates.to_dict()}
                for name, rates in self.rates.items()
            },
            "best": best,
            "engine_times_as_fast": {
                program: self.times_as_fast(name) for program, name in best.items()
            },
            **self.checks_to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """An engine and its rivals with several calls at once, at several batch sizes.

    Attributes:
        callers: callers of the engine, with one thread each; each rival has as many threads.
        slice_seconds: the time of one slice.
        settings: a description of each rival program, by name.
        contests: one per batch size.
        machine: the machine that it was measured on.
    """

    callers: int
    slice_seconds: float
    settings: dict[str, str]
    contests: tuple[StreamContest, ...]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, every slice included."""
        return {
            "callers": self.callers,
            "slice_seconds": self.slice_seconds,
            "settings": self.settings,
            "machine": self.machine,
            "batches": [contest.to_dict() for contest in self.contests],
        }


def throughput(
    engine: Engine,
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    callers: int | None = None,
    budget: Budget = SLICES,
    slice_seconds: float = _SLICE_SECONDS,
    warmup_seconds: float = _WARMUP_SECONDS,
) -> Throughput:
    """Count images per second of an engine, called from one thread per core, and of its rivals.

    The engine uses one thread in each call. Rivals have the same number of threads and their own
    ways to run several batches at once, see `rivals.stream_rivals`. Contestants take turns, a slice
    of time each. This does not check the engine: call `biper_engine.verify` first. It only checks
    that concurrent calls give the same outputs as a single call, bit for bit.

    Args:
        engine: takes and returns one tensor.
        model: the float network.
        batches: images [N, C, H, W], float32, of one call; one contest each, at least one.
        callers: None takes the engine's default number of threads.
        budget: budget of each contest; `fewest` and `most` count slices of each contestant, and
            `seconds` is the time of all.
        slice_seconds: the time of one slice.
        warmup_seconds: time of uncounted calls before each slice.

    Raises:
        ValueError: `callers` is below 1 or more than the processors that may be used, or
            BIPER_NUM_THREADS gives each caller a number of threads other than one.
        ConversionError: the model cannot be captured.
        BackendUnavailableError: concurrent calls gave different outputs than a single call.
    """
    callers = common_threads(callers)
    common_threads(1)
    networks = FloatNetworks.of(model, batches[0])
    contests, settings = [], dict[str, str]()
    with torch_threads(1), torch.inference_mode():
        for images in batches:
            images = images.contiguous(memory_format=torch.channels_last)
            programs = stream_rivals(engine, networks, images, callers)
            settings |= {program: ways[0].how for program, ways in programs.items()}
            ours = Callers([partial(engine, images.clone()) for _ in range(callers)])
            _require_equal(ours(), engine(images))
            turns = _Turns(budget, slice_seconds, warmup_seconds)
            contests.append(_contest(ours, programs, images, turns))
        return Throughput(
            callers=callers,
            slice_seconds=slice_seconds,
            settings=settings,
            contests=tuple(contests),
            machine=machine_facts(),
        )


def _require_equal(outputs: Sequence[Tensor], alone: Tensor) -> None:
    if not all(torch.equal(output, alone) for output in outputs):
        raise BackendUnavailableError(
            f"Nothing was timed: {len(outputs)} concurrent calls of the engine do not all give the "
            "output of a single call. Please report this, with the output of `biper backends`."
        )


@dataclass(frozen=True)
class _Turns:
    """The time that each contestant gets, in turn."""

    budget: Budget
    slice_seconds: float
    warmup_seconds: float

    def take(self, contestants: Mapping[str, Streams], batch: int) -> dict[str, Rates]:
        """Return the images per second of each contestant, one figure per slice."""
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for _ in rounds(self.budget):
            for name, streams in contestants.items():
                sleep(1e-3 * self.budget.pause_ms)
                start, used = perf_counter(), process_time()
                rate = streams.rate(self.slice_seconds, self.warmup_seconds)
                processors = (process_time() - used) / (perf_counter() - start)
                taken[name].append((batch * rate, processors))
        return {name: Rates(*zip(*slices, strict=True)) for name, slices in taken.items()}


def _contest(
    ours: Streams, programs: Mapping[str, Sequence[Rival]], images: Tensor, turns: _Turns
) -> StreamContest:
    rivals = [rival for ways in programs.values() for rival in ways]
    running = [rival for rival in rivals if rival.call is not None]
    contestants = dict[str, Streams]()
    differences = {}
    for rival in running:
        streams = rival.bound(images)
        assert isinstance(streams, Streams)
        assert rival.wanted is not None
        outputs = torch.stack(streams())  # a NaN in any of them makes the difference NaN
        wanted = rival.wanted(images).expand_as(outputs)
        differences[rival.name] = relative_difference(outputs, wanted)
        contestants[rival.name] = streams
    contestants[ENGINE] = ours
    return StreamContest(
        batch=len(images),
        rates=turns.take(contestants, len(images)),
        at_once={name: streams.at_once for name, streams in contestants.items()},
        ways={program: tuple(rival.name for rival in ways) for program, ways in programs.items()},
        differences=differences,
        **facts_of(rivals, running),
    )
