"""The number of threads that the cpu backend uses."""

from __future__ import annotations

import torch

from biper_engine.ops.cpu_module import native
from biper_engine.ops.environment import Variable

__all__ = ["thread_count"]

_VARIABLE = Variable("BIPER_NUM_THREADS")
# Of our own pool, in csrc/cpu/thread_pool.cpp. OpenMP's ends the process where it gets no more.
_MOST_THREADS = 1024


def thread_count() -> int:
    """Return the threads that a call from this thread may use now.

    `BIPER_NUM_THREADS` where it is set; else `torch.get_num_threads()`, but no more than the
    processors that this thread may run on and that the cgroup's quota pays for.

    Raises:
        ValueError: `BIPER_NUM_THREADS` is no integer from 1 to 1024.
    """
    forced = _VARIABLE.get()
    if forced is not None:
        if not forced.isdecimal() or len(forced) > 9 or not 1 <= int(forced) <= _MOST_THREADS:
            shown = forced if len(forced) <= 40 else f"{forced[:40]}..."
            raise ValueError(
                f"BIPER_NUM_THREADS (={shown!r}) must be a positive integer, {_MOST_THREADS:,} at "
                "most. Set it to the number of cores to use, or unset it."
            )
        return int(forced)
    threads = torch.get_num_threads()
    if threads == 1:
        return 1
    processors: int = native().processors()
    return processors if processors < threads else threads
