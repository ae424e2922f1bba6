"""Schemas and shape functions of products of matrices on bits; see `biper_engine.ops.matrix`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biper_engine.ops import backends
from biper_engine.ops.checks import check_dtype
from biper_engine.ops.matrix import MatrixScale, MatrixShape
from biper_engine.ops.matrix_checks import (
    check_matrices,
    check_scale,
    check_unpack_weight,
    check_weight_linear,
)
from biper_engine.ops.registration import DTYPE, empty_map, register

__all__ = ["MATRIX_SCHEMAS", "matrix_shape"]

_SHAPE = "int channels, int groups=1, int low_a=-1, int low_b=-1"

MATRIX_SCHEMAS = {
    "bmatmul": f"(Tensor a, Tensor b, *, {_SHAPE}) -> Tensor",
    "bmatmul_float": (
        f"(Tensor a, Tensor b, *, float multiplier=1.0, float row_multiplier=0.0, "
        f"float column_multiplier=0.0, float bias=0.0, {DTYPE}, {_SHAPE}) -> Tensor"
    ),
    "weight_linear": (
        "(Tensor x, Tensor weight, Tensor multiplier, Tensor? bias=None, Tensor? offset=None)"
        " -> Tensor"
    ),
    "unpack_weight": (
        f"(Tensor weight, Tensor low, Tensor high, *, int channels, {DTYPE}) -> Tensor"
    ),
}


def matrix_shape(named: dict[str, Any]) -> MatrixShape:
    """Return the shape of a product of flat keyword arguments."""
    return MatrixShape(
        named["channels"], named.get("groups", 1), named.get("low_a", -1), named.get("low_b", -1)
    )


def matrix_scale(named: dict[str, Any]) -> MatrixScale:
    """Return the scale of a product of flat keyword arguments."""
    names = ("row_multiplier", "column_multiplier", "bias")
    return MatrixScale(named.get("multiplier", 1.0), *(named.get(name, 0.0) for name in names))


def _bmatmul(a: Tensor, b: Tensor, **named: Any) -> Tensor:
    shape = matrix_shape(named)
    check_matrices(a, b, shape)
    return backends.select("bmatmul", None, a.device).bmatmul(a, b, shape)


def _bmatmul_fake(a: Tensor, b: Tensor, **named: Any) -> Tensor:
    return empty_map(a, check_matrices(a, b, matrix_shape(named)), torch.int32)


def _bmatmul_float(
    a: Tensor, b: Tensor, *, dtype: torch.dtype = torch.float32, **named: Any
) -> Tensor:
    shape, scale = matrix_shape(named), matrix_scale(named)
    check_matrices(a, b, shape)
    check_scale(scale)
    check_dtype("dtype", dtype)
    backend = backends.select("bmatmul_float", None, a.device)
    return backend.bmatmul_float(a, b, shape, scale, dtype)


def _bmatmul_float_fake(
    a: Tensor, b: Tensor, *, dtype: torch.dtype = torch.float32, **named: Any
) -> Tensor:
    check_scale(matrix_scale(named))
    check_dtype("dtype", dtype)
    return empty_map(a, check_matrices(a, b, matrix_shape(named)), dtype)


def _weight_linear(
    x: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    check_weight_linear(x, weight, multiplier, bias, offset)
    backend = backends.select("weight_linear", None, x.device)
    return backend.weight_linear(x, weight, multiplier, bias, offset)


def _weight_linear_fake(
    x: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    check_weight_linear(x, weight, multiplier, bias, offset)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _unpack_weight(
    weight: Tensor, low: Tensor, high: Tensor, *, channels: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    check_unpack_weight(weight, low, high, channels, dtype)
    backend = backends.select("unpack_weight", None, weight.device)
    return backend.unpack_weight(weight, low, high, channels, dtype)


def _unpack_weight_fake(
    weight: Tensor, low: Tensor, high: Tensor, *, channels: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    return weight.new_empty(check_unpack_weight(weight, low, high, channels, dtype), dtype=dtype)


register("bmatmul", MATRIX_SCHEMAS["bmatmul"], _bmatmul, _bmatmul_fake)
register("bmatmul_float", MATRIX_SCHEMAS["bmatmul_float"], _bmatmul_float, _bmatmul_float_fake)
register("weight_linear", MATRIX_SCHEMAS["weight_linear"], _weight_linear, _weight_linear_fake)
register("unpack_weight", MATRIX_SCHEMAS["unpack_weight"], _unpack_weight, _unpack_weight_fake)
