"""Normalisation: of batches, layers and groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import (
    BOOL,
    COUNT,
    FALSE,
    FLOAT,
    SIZE,
    TENSOR,
    Kind,
    integers,
    number,
    optional,
)
from biper_engine.graph.operator import Numbers, Operator, Rule, passing
from biper_engine.graph.sizes import Size, divided
from biper_engine.graph.values import FLOATS, MAX_RANK, Value, require, require_dtype

__all__ = ["OPERATORS"]

_aten = torch.ops.aten


def _operator(
    name: str, target: Any, arguments: dict[str, Kind], result: Rule, batching: Any
) -> Operator:
    return Operator(name=name, target=target, arguments=arguments, result=result, rows=batching)


def _require_parameters(x: Value, *shape: Size, **parameters: Value | None) -> torch.dtype:
    """Require parameters of one dtype and shape; return the dtype.

    It is that of `x`, or float32 for `x` in half precision, as under autocast.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    dtype = next((value.dtype for value in given.values()), x.dtype)
    if x.dtype.itemsize != 2 or dtype != torch.float32:
        dtype = x.dtype
    for name, value in given.items():
        fits = value.dtype == dtype and value.shape == shape
        require(fits, f"`{name}` must be {dtype} {[*shape]}, but it is {value}")
    return dtype


def _batch_norm(
    input: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    **options: Any,
) -> Value:
    require_dtype("input", input, FLOATS)
    require(input.rank >= 2, f"`input` (={input}) has no channels")
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean}
    _require_parameters(input, input.shape[1], **vectors, running_var=running_var)
    return input.like(*input.shape)


def _batch_statistics(
    input: Value, weight: Value | None, bias: Value | None, **options: Any
) -> tuple[Value, ...]:
    require_dtype("input", input, FLOATS[:1])
    require(input.rank >= 2, f"`input` (={input}) has no channels")
    for size in input.shape:
        require(size >= 1, f"`input` (={input}) is empty")
    _require_parameters(input, input.shape[1], weight=weight, bias=bias)
    vector = input.like(input.shape[1])
    return input.like(*input.shape), vector, vector


def _layer_norm(
    input: Value, normalized_shape: Any, weight: Value | None, bias: Value | None, **options: Any
) -> Value:
    require_dtype("input", input, FLOATS)
    normalized = tuple(normalized_shape)
    require(
        input.shape[input.rank - len(normalized) :] == normalized and len(normalized) <= input.rank,
        f"`normalized_shape` (={list(normalized)}) is not how `input` (={input}) ends",
    )
    _require_parameters(input, *normalized, weight=weight, bias=bias)
    return input.like(*input.shape)


def _group_norm(
    input: Value,
    weight: Value | None,
    bias: Value | None,
    N: Size,
    C: int,
    HxW: int,
    group: int,
    eps: float,
) -> tuple[Value, ...]:
    require_dtype("input", input, FLOATS)
    require(input.rank >= 2, f"`input` (={input}) has no channels")
    pixels: Size = 1
    for size in input.shape[2:]:
        require(isinstance(size, int), f"`input` is {input}")
        pixels = pixels * size
    fits = (input.shape[0], input.shape[1], pixels) == (N, C, HxW)
    require(fits, f"`N`, `C`, `HxW` (={N}, {C}, {HxW}) are not the sizes of `input` (={input})")
    divided(C, group)
    dtype = _require_parameters(input, C, weight=weight, bias=bias)
    statistics = input.like(N, group, dtype=dtype)
    return input.like(*input.shape), statistics, statistics


def _normalises_rows(named: Mapping[str, Any], result: Any) -> bool:
    return rows.first_flows(named, result)


def _below_the_batch(named: Mapping[str, Any], result: Any) -> bool:
    return rows.first_flows(named, result) and len(named["normalized_shape"]) < result.rank


_BATCH_NORM = {
    "input": TENSOR,
    **dict.fromkeys(("weight", "bias"), optional(TENSOR)),
    **dict.fromkeys(("running_mean", "running_var"), TENSOR),
    "training": FALSE,
    "momentum": number(0, 1),
    "eps": number(0, 1e3),
    "cudnn_enabled": BOOL,
}
_AFFINE = {"input": TENSOR, "weight": optional(TENSOR), "bias": optional(TENSOR)}

OPERATORS: list[Operator] = [
    *passing(
        Numbers.ELEMENTWISE,
        [
            _operator(
                "batch_norm", _aten.batch_norm.default, _BATCH_NORM, _batch_norm, _normalises_rows
            )
        ],
    ),
    _operator(
        "batch_statistics_norm",
        _aten._native_batch_norm_legit.no_stats,
        {**_AFFINE, "training": Kind("true", lambda v: v is True), "momentum": FLOAT, "eps": FLOAT},
        _batch_statistics,
        rows.mixes,
    ),
    _operator(
        "layer_norm",
        _aten.layer_norm.default,
        {
            "input": TENSOR,
            "normalized_shape": integers(range(1, MAX_RANK), 1),
            "weight": optional(TENSOR),
            "bias": optional(TENSOR),
            "eps": number(0, 1e3),
            "cudnn_enable": BOOL,
        },
        _layer_norm,
        _below_the_batch,
    ),
    _operator(
        "group_norm",
        _aten.native_group_norm.default,
        {
            **_AFFINE,
            **{"N": SIZE, "C": COUNT, "HxW": COUNT, "group": COUNT},
            "eps": number(0, 1e3),
        },
        _group_norm,
        _normalises_rows,
    ),
]
