"""Reductions, scans and sorts along dimensions, and normalisation by statistics of the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import (
    BOOL,
    COUNT,
    DIM,
    DIMS,
    FALSE,
    FLOAT,
    SIZE,
    TENSOR,
    Kind,
    integers,
    number,
    optional,
)
from biper_engine.graph.operator import Numbers, Operator, Result, Rule, passing
from biper_engine.graph.sizes import Size, divided
from biper_engine.graph.values import (
    ANY,
    FLOATS,
    MAX_RANK,
    NUMBERS,
    Value,
    axes,
    axis,
    require,
    require_dtype,
    same_dtype,
)

__all__ = ["OPERATORS"]

_aten = torch.ops.aten


def _operator(
    name: str, target: Any, arguments: dict[str, Kind], result: Rule, batching: Any = rows.over_dims
) -> Operator:
    return Operator(name=name, target=target, arguments=arguments, result=result, rows=batching)


def _reduced(x: Value, dims: Sequence[int], keepdim: bool) -> tuple[Size, ...]:
    """Return the shape without some dimensions, or with 1 in their place."""
    gone = set(axes(dims, x.rank))
    return tuple(
        1 if at in gone else size for at, size in enumerate(x.shape) if keepdim or at not in gone
    )


def _require_elements(x: Value, dims: Sequence[int]) -> None:
    for at in axes(dims, x.rank):
        require(x.shape[at] >= 1, f"`self` (={x}) has nothing along dimension {at}")


# -- over several dimensions -----------------------------------------------------------------------


def _over(
    dtypes: Sequence[torch.dtype],
    dtype_of: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype,
    *,
    needs_elements: bool = False,
) -> Rule:
    """Return the rule of a reduction over `dim`, or over everything if it is empty or None."""

    def rule(self: Value, dim: Any, keepdim: bool, **options: Any) -> Value:
        require_dtype("self", self, dtypes)
        dims = list(dim or range(self.rank))
        if needs_elements:
            _require_elements(self, dims)
        return Value(dtype_of(self.dtype), _reduced(self, dims, keepdim))

    return rule


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.int64


def _whole(rule: Rule) -> Rule:
    """Return the rule of a reduction over all dimensions."""

    def whole(self: Value) -> Result:
        return rule(self=self, dim=None, keepdim=False)

    return whole


def _pair_over(self: Value, dim: Any, keepdim: bool, **options: Any) -> tuple[Value, ...]:
    found = _over(FLOATS)(self=self, dim=dim, keepdim=keepdim)
    assert isinstance(found, Value)
    return found, found


_mean = _over(FLOATS)
_sum = _over(ANY, _sum_dtype)
_extreme = _over(NUMBERS, needs_elements=True)
_TRUTH = tuple(dtype for dtype in ANY if dtype != torch.uint8)  # uint8 results stay uint8
_truth = _over(_TRUTH, lambda dtype: torch.bool)
_DIMS = {"self": TENSOR, "dim": optional(DIMS), "keepdim": BOOL}
_SOME_DIMS = integers(range(1, MAX_RANK + 1), -MAX_RANK, MAX_RANK - 1)
_SPREAD = {**_DIMS, "correction": optional(number(0, 1 << 20))}


# -- over one dimension ----------------------------------------------------------------------------


def _index_of(self: Value, dim: int | None, keepdim: bool) -> Value:
    require_dtype("self", self, NUMBERS)
    dims = list(range(self.rank)) if dim is None else [dim]
    _require_elements(self, dims)
    shape = (1,) * self.rank if dim is None and keepdim else _reduced(self, dims, keepdim)
    return Value(torch.int64, shape, limits=_index_limits(self, dim))


def _index_limits(x: Value, dim: int | None) -> tuple[int, int] | None:
    size = None if dim is None else x.shape[axis(dim, x.rank)]
    return (0, size - 1) if isinstance(size, int) and size > 0 else None


def _extreme_at(self: Value, dim: int, keepdim: bool) -> tuple[Value, ...]:
    require_dtype("self", self, NUMBERS)
    require(self.rank > 0, "`self` has no dimensions")
    _require_elements(self, [dim])
    shape = _reduced(self, [dim], keepdim)
    indices = Value(torch.int64, shape, limits=_index_limits(self, dim))
    return Value(self.dtype, shape), indices


def _truth_at(self: Value, dim: int, keepdim: bool) -> Value:
    require_dtype("self", self, _TRUTH)
    return Value(torch.bool, _reduced(self, [dim], keepdim), limits=(0, 1))


def _product(self: Value, dim: int, keepdim: bool) -> Value:
    require_dtype("self", self, FLOATS)
    return Value(self.dtype, _reduced(self, [dim], keepdim))


def _scan(self: Value, dim: int) -> Value:
    require_dtype("self", self, NUMBERS)
    axis(dim, self.rank)
    return Value(_sum_dtype(self.dtype), self.shape)


def _topk(self: Value, k: int, dim: int, largest: bool, sorted: bool) -> tuple[Value, ...]:
    require_dtype("self", self, NUMBERS)
    require(self.rank > 0, "`self` has no dimensions")
    at = axis(dim, self.rank)
    require(self.shape[at] >= k, f"`k` (={k}) is more than `self` (={self}) has")
    shape = (*self.shape[:at], k, *self.shape[at + 1 :])
    return Value(self.dtype, shape), Value(torch.int64, shape, limits=_index_limits(self, at))


def _sort(self: Value, dim: int, descending: bool) -> tuple[Value, ...]:
    require_dtype("self", self, NUMBERS)
    require(self.rank > 0, "`self` has no dimensions")
    indices = Value(torch.int64, self.shape, limits=_index_limits(self, dim))
    return Value(self.dtype, self.shape), indices


def _norm(self: Value, ord: Any, dim: Any, keepdim: bool) -> Value:
    require_dtype("self", self, FLOATS)
    dims = list(dim or range(self.rank))
    if isinstance(ord, float) and ord == float("inf"):
        _require_elements(self, dims)
    return Value(self.dtype, _reduced(self, dims, keepdim))


_DIM = {"self": TENSOR, "dim": DIM, "keepdim": BOOL}
_NORM_ORDER = Kind(
    "1, 2, inf or another number from 0", lambda v: type(v) in (int, float) and v >= 0
)

# -- normalisation ---------------------------------------------------------------------------------


def _require_vectors(x: Value, size: Size, **vectors: Value | None) -> None:
    """Require vectors of one element for each channel, of the dtype of `x`."""
    for name, vector in vectors.items():
        if vector is not None:
            fits = vector.dtype == x.dtype and vector.shape == (size,)
            require(fits, f"`{name}` must be {x.dtype} [{size}], but it is {vector}")


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
    _require_vectors(input, input.shape[1], **vectors, running_var=running_var)
    return input.like(*input.shape)


def _batch_statistics(
    input: Value, weight: Value | None, bias: Value | None, **options: Any
) -> tuple[Value, ...]:
    require_dtype("input", input, FLOATS[:1])
    require(input.rank >= 2, f"`input` (={input}) has no channels")
    for size in input.shape:
        require(size >= 1, f"`input` (={input}) is empty")
    _require_vectors(input, input.shape[1], weight=weight, bias=bias)
    vector = input.like(input.shape[1])
    return input.like(*input.shape), vector, vector


def _layer_norm(
    input: Value, normalized_shape: Any, weight: Value | None, bias: Value | None, **options: Any
) -> Value:
    same_dtype(FLOATS, input=input, weight=weight, bias=bias)
    normalized = tuple(normalized_shape)
    require(
        input.shape[input.rank - len(normalized) :] == normalized and len(normalized) <= input.rank,
        f"`normalized_shape` (={list(normalized)}) is not how `input` (={input}) ends",
    )
    for name, parameter in (("weight", weight), ("bias", bias)):
        fits = parameter is None or parameter.shape == normalized
        require(fits, f"`{name}` must be {list(normalized)}, but it is {parameter}")
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
    _require_vectors(input, C, weight=weight, bias=bias)
    statistics = input.like(N, group)
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

_LARGEST = [
    _operator("amax", _aten.amax.default, {**_DIMS, "dim": DIMS}, _extreme),
    _operator("amin", _aten.amin.default, {**_DIMS, "dim": DIMS}, _extreme),
]

OPERATORS: list[Operator] = [
    *passing(Numbers.LARGEST, _LARGEST),
    *passing(
        Numbers.ELEMENTWISE,
        [
            _operator(
                "batch_norm", _aten.batch_norm.default, _BATCH_NORM, _batch_norm, _normalises_rows
            )
        ],
    ),
    _operator("mean", _aten.mean.dim, _DIMS, _mean),
    _operator("sum", _aten.sum.dim_IntList, _DIMS, _sum),
    _operator("variance", _aten.var.correction, _SPREAD, _mean),
    _operator("deviation", _aten.std.correction, _SPREAD, _mean),
    _operator("variance_mean", _aten.var_mean.correction, _SPREAD, _pair_over),
    _operator("logsumexp", _aten.logsumexp.default, {**_DIMS, "dim": _SOME_DIMS}, _mean),
    _operator(
        "norm",
        _aten.linalg_vector_norm.default,
        {"self": TENSOR, "ord": _NORM_ORDER, **_DIMS},
        _norm,
    ),
    _operator("mean_all", _aten.mean.default, {"self": TENSOR}, _whole(_mean), rows.mixes),
    _operator("sum_all", _aten.sum.default, {"self": TENSOR}, _whole(_sum), rows.mixes),
    _operator("max_all", _aten.max.default, {"self": TENSOR}, _whole(_extreme), rows.mixes),
    _operator("min_all", _aten.min.default, {"self": TENSOR}, _whole(_extreme), rows.mixes),
    _operator("any_all", _aten.any.default, {"self": TENSOR}, _whole(_truth), rows.mixes),
    _operator("all_all", _aten.all.default, {"self": TENSOR}, _whole(_truth), rows.mixes),
    _operator("argmax", _aten.argmax.default, {**_DIM, "dim": optional(DIM)}, _index_of),
    _operator("argmin", _aten.argmin.default, {**_DIM, "dim": optional(DIM)}, _index_of),
    _operator("max", _aten.max.dim, _DIM, _extreme_at),
    _operator("min", _aten.min.dim, _DIM, _extreme_at),
    _operator("median", _aten.median.dim, _DIM, _extreme_at),
    _operator("any", _aten.any.dim, _DIM, _truth_at),
    _operator("all", _aten.all.dim, _DIM, _truth_at),
    _operator("prod", _aten.prod.dim_int, _DIM, _product),
    _operator("cumsum", _aten.cumsum.default, {"self": TENSOR, "dim": DIM}, _scan),
    _operator("cumprod", _aten.cumprod.default, {"self": TENSOR, "dim": DIM}, _scan),
    _operator(
        "topk",
        _aten.topk.default,
        {"self": TENSOR, "k": COUNT, "dim": DIM, "largest": BOOL, "sorted": BOOL},
        _topk,
    ),
    _operator("sort", _aten.sort.default, {"self": TENSOR, "dim": DIM, "descending": BOOL}, _sort),
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
