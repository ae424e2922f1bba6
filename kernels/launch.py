"""How a kernel is started: numeric options, devices, and the width of its offsets.

A kernel addresses memory by one 64-bit base for the whole program and offsets relative to it. The
offsets are 32-bit wherever all of a tile lies within 2^31 elements of its base, which leaves a
64-bit add per load to the address unit instead of two registers per element; `offset_type` decides.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "EXACT",
    "INTERPRETED",
    "Conv",
    "Pool",
    "capability",
    "check_area",
    "images_in_tile",
    "none_or_bytes",
    "offset_type",
    "on_device",
]

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors."""

EXACT = {"enable_fp_fusion": False}
"""Compiler options of every kernel: a product and a sum are two roundings unless written as fma."""

_OFFSET_LIMIT = 1 << 31


class Conv(Protocol):
    """What a launcher reads of a convolution's geometry."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


class Pool(Protocol):
    """What a launcher reads of a pool's geometry."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    is_identity: bool


@cache
def _capability_of(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """Return the compute capability as 10 * major + minor; 0 on AMD, -1 in the interpreter."""
    if INTERPRETED:
        return -1
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return _capability_of(torch.cuda.current_device() if device.index is None else device.index)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def images_in_tile(rows: int, area: int) -> int:
    """Return in how many images `rows` consecutive pixels of maps with `area` pixels can lie."""
    return (rows + area - 2) // area + 1


def offset_type(*extents: int) -> Any:
    """Return int32 where no tile reaches 2^31 elements beyond its base, else int64.

    Args:
        extents: for every tensor, the elements from a tile's base to the end of its last image.
    """
    return tl.int32 if max(extents) < _OFFSET_LIMIT else tl.int64


def none_or_bytes(flags: Tensor | None) -> Tensor | None:
    """Return a bool tensor as the bytes that a kernel loads, without a copy."""
    return None if flags is None else flags.contiguous().view(torch.uint8)


def check_area(height: int, width: int, rows: int) -> None:
    """Require that a kernel can count a map's pixels, and a tile's beyond them, in 32 bits.

    Raises:
        ValueError: it cannot.
    """
    if height * width >= _OFFSET_LIMIT - rows:
        raise ValueError(f"A map of {height}x{width} has more pixels than a kernel counts (2^31).")
