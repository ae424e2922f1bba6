"""Use one number of threads for all contestants."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from biper_engine.ops.backends import backends

__all__ = ["common_threads", "torch_threads"]


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Set the number of torch's threads inside the context; None leaves it."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def common_threads(threads: int | None) -> int:
    """Return the number of threads that an engine and PyTorch can both use.

    Args:
        threads: the number wanted; None takes an engine's default, which is torch's number
            unless the processors or BIPER_NUM_THREADS limit or change it.

    Raises:
        ValueError: `threads` is below 1, or an engine would use another number.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"`threads` (={threads}) must be 1 or more.")
    forced = os.environ.get("BIPER_NUM_THREADS")
    if threads is not None and forced and forced != str(threads):
        raise ValueError(
            f"{threads} threads are wanted for every contestant, but BIPER_NUM_THREADS={forced} "
            "gives the engine another number. Unset it, or ask for the same number."
        )
    with torch_threads(threads):
        usable = _engine_threads()
    if threads is not None and usable != threads:
        raise ValueError(
            f"{threads} threads are wanted for every contestant, but this process may use "
            f"{usable} processors, and an engine uses no more. Ask for {usable} or fewer."
        )
    return usable


def _engine_threads() -> int:
    if not any(info.name == "cpu" and info.available for info in backends()):
        return torch.get_num_threads()
    from biper_engine.ops.cpu_threads import thread_count

    return thread_count()
