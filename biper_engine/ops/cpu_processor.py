"""What the cpu backend has of this processor: its instruction set, threads and popcount peak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from biper_engine.ops.backends import by_name
from biper_engine.ops.cpu_module import native
from biper_engine.ops.cpu_threads import thread_count

__all__ = ["PopcountPeak", "description", "popcount_peak"]


@dataclass(frozen=True, kw_only=True)
class PopcountPeak:
    """What bounds every binary convolution on one core: its inner loop on registers alone.

    Attributes:
        isa: instruction set in use.
        macs_per_second: multiply-accumulates on bits.
        macs_per_clock: the same by the core's clock, or None where that cannot be counted.
    """

    isa: str
    macs_per_second: float
    macs_per_clock: float | None


def popcount_peak() -> PopcountPeak:
    """Measure this machine's popcount peak for one core; takes about 0.05 s.

    Raises:
        BackendUnavailableError: the cpu backend cannot run here.
    """
    module = _require_native()
    per_second, per_clock = module.measure_peak()
    return PopcountPeak(
        isa=module.isa(), macs_per_second=per_second, macs_per_clock=per_clock or None
    )


def description() -> str:
    """Return the instruction set and the threads in use, such as "avx512, 2 threads".

    Raises:
        BackendUnavailableError: the cpu backend cannot run here.
    """
    threads = thread_count()
    return f"{_require_native().isa()}, {threads} thread{'s' * (threads != 1)}"


def _require_native() -> Any:
    by_name("cpu")
    return native()
