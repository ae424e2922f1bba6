"""Products of matrices on bits, `torch.ops.biper`: of two packed maps, and with binary weights."""

from __future__ import annotations

from typing import Any

import torch

import biper_engine.ops.matrix_operators  # noqa: F401  (registers the operators)
from biper_engine.bits import words
from biper_engine.errors import GeometryError
from biper_engine.graph import rows
from biper_engine.graph.arguments import COUNT, TENSOR, integer, number, optional
from biper_engine.graph.binary import (
    STREAM,
    STREAMS,
    require_clear_bits,
    require_packed,
    require_vectors,
)
from biper_engine.graph.operator import Operator
from biper_engine.graph.sizes import MisfitError
from biper_engine.graph.values import Value, require, require_dtype
from biper_engine.ops.matrix import MatrixShape
from biper_engine.ops.matrix_checks import check_matrix_shape

__all__ = ["OPERATORS"]

_biper = torch.ops.biper


def _product(a: Value, b: Value, dtype: torch.dtype, shape: MatrixShape) -> Value:
    try:
        check_matrix_shape(shape)
    except GeometryError as error:
        raise MisfitError(str(error)) from error
    batch, height, width = require_packed("a", a, shape.channels)
    other, other_height, other_width = require_packed("b", b, shape.channels)
    fits = (batch, height) == (other, other_height)
    require(fits, f"`b` (={b}) must have as many images and rows as `a` (={a})")
    return Value(dtype, (batch, other_width, height * shape.groups, width))


def _bmatmul(a: Value, b: Value, **named: int) -> Value:
    return _product(a, b, torch.int32, MatrixShape(**named))


def _bmatmul_float(
    a: Value,
    b: Value,
    multiplier: float,
    row_multiplier: float,
    column_multiplier: float,
    bias: float,
    dtype: torch.dtype,
    **named: int,
) -> Value:
    return _product(a, b, dtype, MatrixShape(**named))


def _weight_linear(
    x: Value, weight: Value, multiplier: Value, bias: Value | None, offset: Value | None
) -> Value:
    require_dtype("x", x, STREAMS)
    inputs = x.shape[-1] if x.rank else None
    outputs = weight.shape[0] if weight.rank == 2 else None
    fits = isinstance(inputs, int) and inputs >= 1 and isinstance(outputs, int)
    require(fits, f"`x` is {x}, `weight` {weight}")
    assert isinstance(inputs, int)
    assert isinstance(outputs, int)
    _require_words(weight, (outputs, words(inputs)), inputs)
    require_vectors(outputs, multiplier=multiplier, bias=bias, offset=offset)
    return x.like(*x.shape[:-1], outputs)


def _unpack_weight(
    weight: Value, low: Value, high: Value, channels: int, dtype: torch.dtype
) -> Value:
    sizes = weight.shape
    fits = weight.rank == 4 and all(isinstance(size, int) and size >= 1 for size in sizes)
    require(fits, f"`weight` must be [O, KH, KW, words], but it is {weight}")
    outputs, height, width, _ = sizes
    assert isinstance(outputs, int)
    _require_words(weight, (outputs, height, width, words(channels)), channels)
    require_vectors(outputs, low=low, high=high)
    return Value(dtype, (outputs, channels, height, width), flows=False)


def _require_words(weight: Value, shape: tuple[Any, ...], channels: int) -> None:
    fits = weight.dtype == torch.int32 and weight.channels is None and not weight.flows
    require(fits, f"`weight` must be a constant of int32 words, but it is {weight}")
    require(weight.shape == shape, f"`weight` must be {list(shape)}, but it is {weight}")
    require_clear_bits(weight, channels)


_MOST = torch.finfo(torch.float32).max
_FLOAT32 = number(-_MOST, _MOST)
_LOW = integer(-1, 0)
_SHAPE = {"channels": COUNT, "groups": COUNT, "low_a": _LOW, "low_b": _LOW}
_SCALE = dict.fromkeys(("multiplier", "row_multiplier", "column_multiplier", "bias"), _FLOAT32)
_MAPS = {"a": TENSOR, "b": TENSOR}

OPERATORS: list[Operator] = [
    Operator(
        name="biper.bmatmul",
        target=_biper.bmatmul.default,
        arguments={**_MAPS, **_SHAPE},
        result=_bmatmul,
        rows=rows.all_flow,
    ),
    Operator(
        name="biper.bmatmul_float",
        target=_biper.bmatmul_float.default,
        arguments={**_MAPS, **_SCALE, "dtype": STREAM, **_SHAPE},
        result=_bmatmul_float,
        rows=rows.all_flow,
    ),
    Operator(
        name="biper.weight_linear",
        target=_biper.weight_linear.default,
        arguments={
            **dict.fromkeys(("x", "weight", "multiplier"), TENSOR),
            **dict.fromkeys(("bias", "offset"), optional(TENSOR)),
        },
        result=_weight_linear,
        rows=rows.first_flows,
    ),
    Operator(
        name="biper.unpack_weight",
        target=_biper.unpack_weight.default,
        arguments={
            **dict.fromkeys(("weight", "low", "high"), TENSOR),
            **{"channels": COUNT, "dtype": STREAM},
        },
        result=_unpack_weight,
    ),
]
