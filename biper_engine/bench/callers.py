"""Streams: several calls at once, and how many a second they make together."""

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
    """Work on several batches at once, each with memory of its own.

    Attributes:
        at_once: calls that are under way together.
    """

    at_once: int

    @abstractmethod
    def __call__(self) -> list[Tensor]:
        """Make every call once, all at once; return the outputs of each."""

    @abstractmethod
    def rate(self, seconds: float, warmup_seconds: float) -> float:
        """Return the calls that finish in a second, all streams together.

        Args:
            seconds: of timing, after the warm-up.
            warmup_seconds: of calls that do not count, without a gap before those that do.
        """


class Callers(Streams):
    """One Python thread for each call, in `torch.inference_mode`.

    Threads are new every time, start together, and are gone afterwards. They have torch's number of
    threads, for the threads of a call's own, and the forced backend of the thread that made them.

    Args:
        calls: of no arguments, which release Python's lock while they work, and do not share
            memory that they write to.
    """

    def __init__(self, calls: Sequence[Callable[[], Tensor]]) -> None:
        self._calls = tuple(calls)
        self.at_once = len(self._calls)

    def __call__(self) -> list[Tensor]:
        """Make every call once, all at once; return the outputs of each."""
        return self._run(lambda call: call())

    def rate(self, seconds: float, warmup_seconds: float) -> float:
        """Return the calls that finish in a second, as the sum over the threads."""
        begin = perf_counter() + warmup_seconds
        return sum(self._run(lambda call: paced(call, begin, begin + seconds)))

    def _run(self, work: Callable[[Callable[[], Tensor]], _T]) -> list[_T]:
        everyone = Barrier(self.at_once)

        def in_inference_mode(call: Callable[[], Tensor]) -> _T:
            everyone.wait()
            with torch.inference_mode():  # every thread has a mode of its own
                return work(call)

        # And a context of its own: what `use_backend` forces here would not hold there.
        contexts = [copy_context() for _ in self._calls]
        with ThreadPoolExecutor(self.at_once) as pool:
            started = [
                pool.submit(context.run, in_inference_mode, call)
                for context, call in zip(contexts, self._calls, strict=True)
            ]
            return [future.result() for future in started]


def paced(call: Callable[[], object], begin: float, end: float) -> float:
    """Make calls without a gap and return how many a second finish from `begin` to `end`.

    The clock starts and stops where a call finishes, so that no part of a call is lost or counted
    as a whole. One call counts at least.

    Args:
        call: of no arguments.
        begin: by `perf_counter`; calls before it do not count.
        end: by `perf_counter`.
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
