"""Validate the arguments of products of matrices; see `biper_engine.ops.checks`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from biper_engine.bits import words
from biper_engine.errors import GeometryError
from biper_engine.geometry import MAX_REDUCTION
from biper_engine.ops.checks import check_dtype, check_packed_map, check_per_channel
from biper_engine.ops.matrix import MatrixScale, MatrixShape

__all__ = [
    "check_matrices",
    "check_matrix_shape",
    "check_scale",
    "check_unpack_weight",
    "check_weight_linear",
]


def check_matrix_shape(shape: MatrixShape) -> None:
    """Require groups that divide the channels, exact sums, and elements that bits stand for."""
    if shape.channels < 1 or shape.groups < 1 or shape.channels % shape.groups:
        raise GeometryError(
            f"`groups` (={shape.groups}) must be at least 1 and divide `channels` "
            f"(={shape.channels})."
        )
    if shape.depth >= MAX_REDUCTION:
        raise GeometryError(
            f"Each sum would have {shape.depth} elements, but fewer than 2^24 are wanted, so that "
            "float32 holds it."
        )
    for name in ("low_a", "low_b"):
        if getattr(shape, name) not in (-1, 0):
            raise GeometryError(f"`{name}` (={getattr(shape, name)}) must be -1 or 0.")


def check_matrices(a: Tensor, b: Tensor, shape: MatrixShape) -> tuple[int, int, int, int]:
    """Require two packed maps of the same images, rows and channels; return the result's shape."""
    check_matrix_shape(shape)
    check_packed_map("a", a, shape.channels)
    check_packed_map("b", b, shape.channels)
    if a.shape[:2] != b.shape[:2]:
        raise GeometryError(
            f"`a` (={tuple(a.shape)}) and `b` (={tuple(b.shape)}) must have the same numbers of "
            "images and rows."
        )
    if a.device != b.device:
        raise ValueError(f"`b` is on {b.device}, but `a` is on {a.device}; move one with `.to()`.")
    return a.shape[0], b.shape[2], a.shape[1] * shape.groups, a.shape[2]


def check_scale(scale: MatrixScale) -> None:
    """Require numbers that float32 holds."""
    largest = torch.finfo(torch.float32).max
    for name in ("multiplier", "row_multiplier", "column_multiplier", "bias"):
        value = getattr(scale, name)
        if not math.isfinite(value) or abs(value) > largest:
            raise ValueError(f"`{name}` (={value}) must be a finite float32 number.")


def check_weight_linear(
    x: Tensor, weight: Tensor, multiplier: Tensor, bias: Tensor | None, offset: Tensor | None
) -> None:
    """Require rows of floats, a weight of as many inputs, and a number for each output."""
    check_dtype("x.dtype", x.dtype)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise GeometryError(f"`x` must be [..., inputs], but its shape is {tuple(x.shape)}.")
    inputs = x.shape[-1]
    if weight.dtype != torch.int32:
        raise TypeError(f"`weight` must be int32 words, but its dtype is {weight.dtype}.")
    if weight.dim() != 2 or weight.shape[1] != words(inputs):
        raise GeometryError(
            f"`weight` must be [outputs, {words(inputs)}] for {inputs} inputs, but its shape is "
            f"{tuple(weight.shape)}."
        )
    if weight.device != x.device:
        raise ValueError(
            f"`weight` is on {weight.device}, but `x` is on {x.device}; move one with `.to()`."
        )
    named = {"multiplier": multiplier, "bias": bias, "offset": offset}
    check_per_channel(named, weight.shape[0], x.device)


def check_unpack_weight(
    weight: Tensor, low: Tensor, high: Tensor, channels: int, dtype: torch.dtype
) -> tuple[int, int, int, int]:
    """Require packed weights and two numbers for each output; return the result's shape."""
    check_dtype("dtype", dtype)
    check_packed_map("weight", weight, channels)
    outputs, height, width, _ = weight.shape
    check_per_channel({"low": low, "high": high}, outputs, weight.device)
    return outputs, channels, height, width
