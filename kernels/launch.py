"""Launching of kernels: numeric options, devices, and the width of offsets.

A kernel addresses memory by one 64-bit base for the whole program and offsets relative to it. The
offsets are 32-bit if all of a tile is within 2^31 elements of its base. The address unit then does
the 64-bit add of a load, and no element needs two registers; `offset_type` decides.

Geometries, pools, epilogues and stems are the engine's dataclasses. Launchers read their attributes
and import nothing from the engine.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "EXACT",
    "INTERPRETED",
    "capability",
    "check_area",
    "images_in_tile",
    "none_or_bytes",
    "offset_type",
]

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors."""

EXACT = {"enable_fp_fusion": False}
"""Compiler options of every kernel: product and sum are rounded separately, except in fma."""

_OFFSET_LIMIT = 1 << 31


def capability(device: torch.device) -> int:
    """Return the compute capability as 10 * major + minor; 0 on AMD, -1 in the interpreter."""
    if INTERPRETED:
        return -1
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def images_in_tile(rows: int, area: int) -> int:
    """Return how many images `rows` consecutive pixels of maps with `area` pixels can span."""
    return (rows + area - 2) // area + 1


def offset_type(*extents: int) -> tl.dtype:
    """Return int32 if no tile reaches 2^31 elements beyond its base, else int64.

    Args:
        extents: for every tensor, the elements from a tile's base to the end of its last image.
    """
    return tl.int32 if max(extents) < _OFFSET_LIMIT else tl.int64


def none_or_bytes(flags: Tensor | None) -> Tensor | None:
    """Return a bool tensor as the bytes that a kernel loads, without a copy."""
    return None if flags is None else flags.contiguous().view(torch.uint8)


def check_area(height: int, width: int, rows: int) -> None:
    """Require that 32 bits can count a map's pixels and the pixels of a tile beyond them.

    Raises:
        ValueError: they cannot.
    """
    if height * width >= _OFFSET_LIMIT - rows:
        raise ValueError(f"A map of {height}x{width} has more pixels than a kernel counts (2^31).")
