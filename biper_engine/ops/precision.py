"""Switch off PyTorch's TF32 while a network runs, so that float32 products are float32.

PyTorch rounds the operands of float32 convolutions to 11 bits on CUDA GPUs by default (TF32), which
an exact network must not do. The switches apply to the whole process: while one thread is in this
context, the float32 products of other threads are exact, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["without_tf32"]

_lock = threading.Lock()
_inside = 0
_restore: Callable[[], None] | None = None


@contextmanager
def without_tf32() -> Iterator[None]:
    """Launch float32 convolutions and products without TF32.

    The first of several threads to enter switches it off, and the last to leave restores it. If it
    was off before, nothing is changed.
    """
    global _inside, _restore
    with _lock:
        if _inside == 0:
            _restore = _switch_off()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _restore is not None:
                restore, _restore = _restore, None
                restore()


def _switch_off() -> Callable[[], None]:
    """Switch TF32 off; return a function that restores the present state.

    PyTorch has two sets of names for it. Reading the older one raises if the newer one, from
    PyTorch 2.9, has been set to something else. The older one is tried first: while the newer one
    is in use here, reading the older one elsewhere would raise.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        convolutions, products = cudnn.allow_tf32, matmul.allow_tf32
    except RuntimeError:
        return _switch_off_by_precision()
    precision = torch.get_float32_matmul_precision() if products else ""  # "high" or "medium"
    if convolutions:
        cudnn.allow_tf32 = False
    if products:
        torch.set_float32_matmul_precision("highest")

    def restore() -> None:
        if convolutions:
            cudnn.allow_tf32 = True
        if products:
            torch.set_float32_matmul_precision(precision)

    return restore


def _switch_off_by_precision() -> Callable[[], None]:
    switches: tuple[Any, ...] = (
        torch.backends.cudnn.conv,  # type: ignore[attr-defined, unused-ignore]
        torch.backends.cuda.matmul,
    )
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"

    def restore() -> None:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision

    return restore
