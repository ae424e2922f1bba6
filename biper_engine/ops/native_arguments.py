"""Arguments of the compiled modules: tensors as memory, geometries as tuples of integers."""

from __future__ import annotations

import torch
from torch import Tensor

from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry

__all__ = [
    "STREAM_TYPES",
    "channels_last",
    "contiguous",
    "geometry_values",
    "memory",
    "pool_values",
    "typed_memory",
]

STREAM_TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.uint8: 4}
"""Dtypes as the modules count them; bytes are images, for csrc/cuda alone."""


def memory(tensor: Tensor | None) -> tuple[int, int] | None:
    """Return address and elements."""
    return None if tensor is None else (tensor.data_ptr(), tensor.numel())


def typed_memory(tensor: Tensor | None) -> tuple[int, int, int] | None:
    """Return address, elements and type."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.numel(), STREAM_TYPES[tensor.dtype]


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor without gaps, copied only where it has some."""
    return None if tensor is None else tensor.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """Return `x` with its channels together in memory, copied only where they are not."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def geometry_values(geometry: Conv2dGeometry) -> tuple[int, ...]:
    """Return channels, groups, kernel, stride, padding and dilation."""
    return (
        *(geometry.in_channels, geometry.out_channels, geometry.groups),
        *(*geometry.kernel_size, *geometry.stride, *geometry.padding, *geometry.dilation),
    )


def pool_values(pool: Pool2dGeometry) -> tuple[int, ...]:
    """Return kernel, stride and padding."""
    return (*pool.kernel_size, *pool.stride, *pool.padding)
