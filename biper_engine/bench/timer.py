"""Take wall-clock samples of several functions that are called in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import Any

__all__ = ["Budget", "Samples", "interleave", "quartiles", "rounds"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to measure.

    Attributes:
        seconds: stop after this time, all functions together.
        fewest: smallest number of calls of each function, however long they take.
        most: largest number of calls of each function.
        warmup: uncounted calls of each function before the first that counts.
        pause_ms: sleep before each turn, so that the previous function's threads fall asleep.
        ahead: uncounted calls at the start of each turn, which wake a function's own threads
            and bring its data back into the caches.
    """

    seconds: float = 5.0
    fewest: int = 5
    most: int = 1000
    warmup: int = 3
    pause_ms: float = 0.0
    ahead: int = 0

    def __post_init__(self) -> None:
        amounts = {name: getattr(self, name) for name in ("seconds", "warmup", "pause_ms", "ahead")}
        if min(amounts.values()) < 0 or not 1 <= self.fewest <= self.most:
            listed = ", ".join(f"`{name}` (={amount})" for name, amount in amounts.items())
            raise ValueError(
                f"{listed} must not be negative, `fewest` (={self.fewest}) from 1 to `most` "
                f"(={self.most})."
            )


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return two values: a quarter of all are below the first, a quarter above the second."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def rounds(budget: Budget) -> Iterator[int]:
    """Count rounds, from 0, until `budget` is spent; the clock starts at the first."""
    end = perf_counter() + budget.seconds
    for done in range(budget.most):
        if done >= budget.fewest and perf_counter() >= end:
            return
        yield done


@dataclass(frozen=True)
class Samples:
    """Wall-clock milliseconds of single calls, in the order in which they were made."""

    ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median sample: half of the calls were faster."""
        return statistics.median(self.ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """A quarter of the calls were faster than the first, a quarter slower than the second."""
        return quartiles(self.ms)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, raw samples included."""
        low, high = self.quartiles_ms
        return {
            "median_ms": self.median_ms,
            "quartile_1_ms": low,
            "quartile_3_ms": high,
            "samples_ms": list(self.ms),
        }


def interleave(
    calls: Mapping[str, Callable[[], object]],
    budget: Budget,
    rest_ms: Mapping[str, float] | None = None,
) -> dict[str, Samples]:
    """Call every function once per round, so that other load on the machine affects all alike.

    Args:
        calls: functions that finish their work before they return, by name.
        budget: how many rounds to run.
        rest_ms: sleep after the turns of some functions, by name, in addition to the pause, for
            their threads that go on spinning.

    Returns:
        The samples of every function, the same number for each.
    """
    for _ in range(budget.warmup):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rests = rest_ms or {}
    for _ in rounds(budget):
        for name, call in calls.items():
            if budget.pause_ms:
                sleep(1e-3 * budget.pause_ms)
            for _ in range(budget.ahead):
                call()
            start = perf_counter()
            call()
            seconds[name].append(perf_counter() - start)
            if rests.get(name):
                sleep(1e-3 * rests[name])
    return {name: Samples(tuple(1e3 * s for s in taken)) for name, taken in seconds.items()}
