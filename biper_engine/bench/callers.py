"""Streams: run several calls at once, and count how many they make per second together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Barrier
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Callers", "Streams", "paced"]

_T = TypeVar("_T")


class Streams(ABC):
    """Run several batches at once, each with its own memory.

    Attributes:
        at_once: calls that run at the same time.
    """

    at_once: int

    @abstractmethod
    def __call__(self) -> list[Tensor]:
        """Make every call once, all at once; return the outputs of each."""

    @abstractmethod
    def rate(self, seconds: float, warmup_seconds: float) -> float:
        """Return the calls that finish per second, all streams together.

        Args:
            seconds: time that is measured, after the warm-up.
            warmup_seconds: time of calls that do not count, without a gap before those that do.
        """


class Callers(Streams):
    """One Python thread for each call, in `torch.inference_mode`.

    New threads start together every time and end afterwards. They use torch's number of threads
    within a call, and the forced backend of the thread that created them.

    Args:
        calls: functions without arguments that release the GIL while they work and do not share
            memory that they write to.
    """

    def __init__(self, calls: Sequence[Callable[[], Tensor]]) -> None:
        self._calls = tuple(calls)
        self.at_once = len(self._calls)

    def __call__(self) -> list[Tensor]:
        """Make every call once, all at once; return the outputs of each."""
        return self._run(lambda call: call())

    def rate(self, seconds: float, warmup_seconds: float) -> float:
        """Return the calls that finish per second, as the sum over the threads."""
        begin = perf_counter() + warmup_seconds
        return sum(self._run(lambda call: paced(call, begin, begin + seconds)))

    def _run(self, work: Callable[[Callable[[], Tensor]], _T]) -> list[_T]:
        everyone = Barrier(self.at_once)

        def in_inference_mode(call: Callable[[], Tensor]) -> _T:
            everyone.wait()
            with torch.inference_mode():  # every thread has its own mode
                return work(call)

        # Every thread also has its own context, without the backend that `use_backend` forces here.
        contexts = [copy_context() for _ in self._calls]
        with ThreadPoolExecutor(self.at_once) as pool:
            started = [
                pool.submit(context.run, in_inference_mode, call)
                for context, call in zip(contexts, self._calls, strict=True)
            ]
            return [future.result() for future in started]


def paced(call: Callable[[], object], begin: float, end: float) -> float:
    """Make calls without a gap and return how many per second finish from `begin` to `end`.

    The clock starts and stops when a call finishes, so that no part of a call is lost or counted
    as a whole call. At least one call counts.

    Args:
        call: a function without arguments.
        begin: a time of `perf_counter`; calls before it do not count.
        end: a time of `perf_counter`.
    """
    while perf_counter() < begin:
        call()
    first = last = perf_counter()
    calls = 0
    while last < end or not calls:
        call()
        calls += 1
        last = perf_counter()
    return calls / (last - first)
