"""Operators that PyTorch cannot trace with a free batch, written with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["FUNCTIONS", "OPERATORS"]

aten = torch.ops.aten


def _fake_quantized(
    x: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    """Quantize and dequantize as PyTorch's kernel does, with the inverse of the scale."""
    inverse = scale.reciprocal() if isinstance(scale, Tensor) else 1.0 / scale
    zero = zero_point.to(x.dtype) if isinstance(zero_point, Tensor) else zero_point
    quantized = torch.clamp(torch.round(x * inverse) + zero, quant_min, quant_max)
    return (quantized - zero) * scale, torch.ones_like(x, dtype=torch.bool)  # only for gradients


def _fake_quantized_if_enabled(
    x: Tensor, scale: Tensor, zero_point: Tensor, enabled: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    quantized, mask = _fake_quantized(x, scale, zero_point, quant_min, quant_max)
    return torch.where(enabled != 0, quantized, x), mask


def _fake_quantized_by_channel(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    shape = [-1 if at == axis % x.dim() else 1 for at in range(x.dim())]
    return _fake_quantized(x, scale.view(shape), zero_point.view(shape), quant_min, quant_max)


def _take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    if dim is None:
        return input.flatten().gather(0, indices.flatten())
    shapes = [list(x.shape) for x in (input, indices)]
    for at in range(input.dim()):
        if at != dim % input.dim():
            for own, other in (shapes, shapes[::-1]):
                if isinstance(own[at], int) and own[at] == 1:
                    own[at] = other[at]
    return input.expand(shapes[0]).gather(dim, indices.expand(shapes[1]))


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten.fake_quantize_per_tensor_affine_cachemask.default: _fake_quantized,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default: (
        _fake_quantized_if_enabled
    ),
    aten.fake_quantize_per_channel_affine_cachemask.default: _fake_quantized_by_channel,
}
"""Overloads, and what returns their results."""

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.take_along_dim: _take_along_dim,
    Tensor.take_along_dim: _take_along_dim,
}
"""Python functions, and what returns their results."""
