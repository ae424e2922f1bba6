"""Arguments of the compiled modules: tensors as memory, geometries as tuples of integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry

__all__ = [
    "STREAM_TYPES",
    "channels_last",
    "contiguous",
    "dense",
    "geometry_values",
    "memory",
    "native_memory",
    "native_values",
    "pool_values",
    "typed_memory",
]

STREAM_TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.uint8: 4}
"""Numbers of dtypes in the modules; bytes are images, for csrc/cuda only."""

_MEMORY_TYPES = {torch.float32: 1, torch.int32: 5, torch.bool: 6}
"""Numbers of the dtypes of parameters, packed maps and accumulators in csrc/cpu."""


def memory(tensor: Tensor | None) -> tuple[int, int] | None:
    """Return the address and the number of elements."""
    return None if tensor is None else (tensor.data_ptr(), tensor.numel())


def native_memory(tensor: Tensor | None) -> tuple[int, int, int] | None:
    """Return the address, number of elements and type of a tensor for csrc/cpu.

    Raises:
        ValueError: it is not a float32, int32 or bool CPU tensor, or its memory has gaps.
    """
    if tensor is None:
        return None
    kind = _MEMORY_TYPES.get(tensor.dtype)
    dense = tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    if kind is None or not dense or tensor.device.type != "cpu":
        raise ValueError(
            f"A native step takes CPU tensors of float32, int32 or bool without gaps in memory, "
            f"but this one is {tensor.dtype} {list(tensor.shape)} with strides "
            f"{list(tensor.stride())} on {tensor.device}."
        )
    return tensor.data_ptr(), tensor.numel(), kind


def typed_memory(tensor: Tensor | None) -> tuple[int, int, int] | None:
    """Return the address, number of elements and type."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.numel(), STREAM_TYPES[tensor.dtype]


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor without gaps, copied only if it has some."""
    return None if tensor is None else tensor.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """Return `x` in channels_last memory, copied only if it is not."""
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


def dense(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with tensors without gaps, copied only where they have some."""
    return {
        name: value.contiguous() if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def native_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return dense arguments as `Arguments` of csrc/cpu has them; the tensors must outlive it.

    Raises:
        ValueError: as `native_memory` does.
    """
    return {name: _native_value(value) for name, value in values.items()}


def _native_value(value: Any) -> Any:
    match value:
        case Tensor():
            return native_memory(value)
        case Conv2dGeometry():
            return geometry_values(value)
        case Pool2dGeometry():
            return pool_values(value)
    return value
