"""Operators that PyTorch cannot trace with a free batch, written with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

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


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> Tensor:
    """Convolve; if each image has weights of its own, as many groups as images, by products.

    Networks of experts choose or mix their weights for each image, and then convolve all images as
    the groups of one: the number of groups is the batch, which an operator cannot take.
    """
    one = input.dim() == 4 and isinstance(input.shape[0], int) and input.shape[0] == 1
    if not (isinstance(groups, torch.SymInt) and one):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    size, steps, gaps = (_pair(value) for value in (weight.shape[2:], stride, dilation))
    around = (0, 0) if isinstance(padding, str) else _pair(padding)
    if padding == "same":
        down, right = (gap * (kernel - 1) for gap, kernel in zip(gaps, size, strict=True))
        around = (down // 2, right // 2)
    images = input.reshape(groups, -1, *input.shape[2:])
    if padding == "same" and (down % 2 or right % 2):
        images = pad(images, (0, right % 2, 0, down % 2))
    height, width = (
        (length + 2 * edge - gap * (kernel - 1) - 1) // step + 1
        for length, edge, gap, kernel, step in zip(
            images.shape[2:], around, gaps, size, steps, strict=True
        )
    )
    columns = unfold(images, size, gaps, around, steps)
    products = weight.reshape(groups, -1, columns.shape[1]) @ columns
    result = products.reshape(1, -1, height, width)
    return result if bias is None else result + bias.view(1, -1, 1, 1)


def _pair(value: Any) -> tuple[int, int]:
    first, *others = value if isinstance(value, tuple | list | torch.Size) else (value,)
    return first, (others[0] if others else first)


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten.fake_quantize_per_tensor_affine_cachemask.default: _fake_quantized,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default: (
        _fake_quantized_if_enabled
    ),
    aten.fake_quantize_per_channel_affine_cachemask.default: _fake_quantized_by_channel,
}
"""Overloads, and what returns their results."""

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.conv2d: _conv2d,
    torch.take_along_dim: _take_along_dim,
    Tensor.take_along_dim: _take_along_dim,
}
"""Python functions, and what returns their results."""
