"""Float32 products that are float32: PyTorch's TF32 switched off while a network runs.

PyTorch rounds the operands of float32 convolutions to 11 bits on CUDA GPUs by default (TF32), which
an exact network must not do. The switches hold for the whole process: while some thread is in here,
the float32 products that another launches are exact, too.
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

    The first of several threads to enter switches it off, and the last to leave switches on again
    what was on. Where nothing was, nothing is changed.
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
    """Switch TF32 off; return what restores the present state.

    PyTorch has two sets of names for it, and reading the older one raises where the newer one, of
    PyTorch 2.9, has been used to say something else. The older one is tried first, since reading it
    elsewhere would raise while the newer one is in use here.
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
