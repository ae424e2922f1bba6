"""Scans, sorts and reductions along one dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import BOOL, COUNT, DIM, DTYPE, TENSOR, Kind, number, optional
from biper_engine.graph.operator import Operator, Rule
from biper_engine.graph.reductions import (
    TRUTH,
    WIDE,
    reduced,
    require_accumulating,
    require_elements,
    sum_dtype,
)
from biper_engine.graph.sizes import ImagesSize
from biper_engine.graph.values import (
    ANY,
    FLOATS,
    NUMBERS,
    Value,
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


def _index_limits(x: Value, dim: int | None) -> tuple[int, int] | None:
    size = None if dim is None or not x.rank else x.shape[axis(dim, x.rank)]
    return (0, size - 1) if isinstance(size, int) and size > 0 else None


def _require_dimensions(x: Value, dim: int) -> int:
    require(x.rank > 0, "`self` has no dimensions")
    return axis(dim, x.rank)


# -- one element of many ---------------------------------------------------------------------------


def _index_of(self: Value, dim: int | None, keepdim: bool) -> Value:
    require_dtype("self", self, NUMBERS)
    dims = list(range(self.rank)) if dim is None else [dim]
    require_elements(self, dims)
    shape = (1,) * self.rank if dim is None and keepdim else reduced(self, dims, keepdim)
    return Value(torch.int64, shape, limits=_index_limits(self, dim))


def _one_of(dtypes: Sequence[torch.dtype]) -> Rule:
    """Return the rule of an operator that returns an element along `dim`, and its position."""

    def rule(self: Value, dim: int, keepdim: bool, **options: Any) -> tuple[Value, ...]:
        require_dtype("self", self, dtypes)
        _require_dimensions(self, dim)
        require_elements(self, [dim])
        shape = reduced(self, [dim], keepdim)
        indices = Value(torch.int64, shape, limits=_index_limits(self, dim))
        return Value(self.dtype, shape), indices

    return rule


def _kth(self: Value, k: int, dim: int, keepdim: bool) -> tuple[Value, ...]:
    at = _require_dimensions(self, dim)
    require(self.shape[at] >= k, f"`k` (={k}) is more than `self` (={self}) has")
    found = _one_of(NUMBERS)(self=self, dim=dim, keepdim=keepdim)
    assert isinstance(found, tuple)
    return found


def _both_extremes(self: Value, dim: int | None, keepdim: bool) -> tuple[Value, ...]:
    require_dtype("self", self, NUMBERS)
    dims = list(range(self.rank)) if dim is None else [dim]
    require_elements(self, dims)
    require(dim is not None or not keepdim, "`keepdim` needs `dim`")
    found = Value(self.dtype, reduced(self, dims, keepdim))
    return found, found


def _truth_at(self: Value, dim: int, keepdim: bool) -> Value:
    require_dtype("self", self, TRUTH)
    return Value(torch.bool, reduced(self, [dim], keepdim), limits=(0, 1))


# -- products and sums -----------------------------------------------------------------------------


def _product(self: Value, dim: int, keepdim: bool, dtype: torch.dtype | None) -> Value:
    require_dtype("self", self, ANY)
    require_accumulating(self, dtype)
    return Value(dtype or sum_dtype(self.dtype), reduced(self, [dim], keepdim))


def _scan(self: Value, dim: int, dtype: torch.dtype | None) -> Value:
    require_dtype("self", self, ANY)
    axis(dim, self.rank)
    require_accumulating(self, dtype)
    return Value(dtype or sum_dtype(self.dtype), self.shape)


def _scan_of_exponentials(self: Value, dim: int) -> Value:
    require_dtype("self", self, FLOATS)
    _require_dimensions(self, dim)
    return self.like(*self.shape)


def _extremes_so_far(self: Value, dim: int) -> tuple[Value, ...]:
    require_dtype("self", self, NUMBERS)
    _require_dimensions(self, dim)
    indices = Value(torch.int64, self.shape, limits=_index_limits(self, dim))
    return self.like(*self.shape), indices


def _renorm(self: Value, p: Any, dim: int, maxnorm: Any) -> Value:
    require_dtype("self", self, WIDE)
    require(self.rank >= 2, f"`self` (={self}) has no vectors")
    _require_dimensions(self, dim)
    return self.like(*self.shape)


def _cross(self: Value, other: Value, dim: int) -> Value:
    same_dtype(FLOATS, self=self, other=other)
    at = _require_dimensions(self, dim)
    fits = self.shape == other.shape and self.shape[at] == 3
    require(fits, f"`self` (={self}) and `other` (={other}) have no vectors of 3 along {dim}")
    return self.like(*self.shape)


# -- order -----------------------------------------------------------------------------------------


def _topk(self: Value, k: int, dim: int, largest: bool, sorted: bool) -> tuple[Value, ...]:
    require_dtype("self", self, NUMBERS)
    at = _require_dimensions(self, dim)
    require(self.shape[at] >= k, f"`k` (={k}) is more than `self` (={self}) has")
    shape = (*self.shape[:at], k, *self.shape[at + 1 :])
    return Value(self.dtype, shape), Value(torch.int64, shape, limits=_index_limits(self, at))


def _sort(self: Value, dim: int, descending: bool, **options: Any) -> tuple[Value, ...]:
    require_dtype("self", self, NUMBERS)
    _require_dimensions(self, dim)
    indices = Value(torch.int64, self.shape, limits=_index_limits(self, dim))
    return Value(self.dtype, self.shape), indices


def _interval(values: Value, boundaries: Value, out_int32: bool) -> Value:
    same_dtype(NUMBERS, boundaries=boundaries, values=values)
    count = boundaries.shape[-1] if boundaries.rank else 0
    dtype = torch.int32 if out_int32 else torch.int64
    limits = None if isinstance(count, ImagesSize) else (0, count)
    return Value(dtype, values.shape, limits=limits)


def _bucketize(self: Value, boundaries: Value, out_int32: bool, right: bool) -> Value:
    require(boundaries.rank == 1, f"`boundaries` is {boundaries}")
    return _interval(self, boundaries, out_int32)


def _searchsorted(
    sorted_sequence: Value, self: Value, out_int32: bool, right: bool, **options: Any
) -> Value:
    rank = sorted_sequence.rank
    same_rows = rank == self.rank >= 1 and sorted_sequence.shape[:-1] == self.shape[:-1]
    require(rank == 1 or same_rows, f"`sorted_sequence` is {sorted_sequence}, `self` {self}")
    return _interval(self, sorted_sequence, out_int32)


def _all_but_boundaries(named: Any, result: Any) -> bool:
    return bool(named["self"].flows and not named["boundaries"].flows)


_SELF_DIM = {"self": TENSOR, "dim": DIM}
_DIM = {**_SELF_DIM, "keepdim": BOOL}
_SUM = {"dtype": optional(DTYPE)}
_SORT = {**_SELF_DIM, "descending": BOOL}
_INTERVAL = {"out_int32": BOOL, "right": BOOL}

OPERATORS: list[Operator] = [
    _operator("argmax", _aten.argmax.default, {**_DIM, "dim": optional(DIM)}, _index_of),
    _operator("argmin", _aten.argmin.default, {**_DIM, "dim": optional(DIM)}, _index_of),
    _operator("max", _aten.max.dim, _DIM, _one_of(NUMBERS)),
    _operator("min", _aten.min.dim, _DIM, _one_of(NUMBERS)),
    _operator("median", _aten.median.dim, _DIM, _one_of(NUMBERS)),
    _operator("nanmedian", _aten.nanmedian.dim, _DIM, _one_of(NUMBERS)),
    _operator("mode", _aten.mode.default, _DIM, _one_of(NUMBERS)),
    _operator("kth_value", _aten.kthvalue.default, {**_DIM, "k": COUNT}, _kth),
    _operator("aminmax", _aten.aminmax.default, {**_DIM, "dim": optional(DIM)}, _both_extremes),
    _operator("any", _aten.any.dim, _DIM, _truth_at),
    _operator("all", _aten.all.dim, _DIM, _truth_at),
    _operator("prod", _aten.prod.dim_int, {**_DIM, **_SUM}, _product),
    _operator("cumsum", _aten.cumsum.default, {**_SELF_DIM, **_SUM}, _scan),
    _operator("cumprod", _aten.cumprod.default, {**_SELF_DIM, **_SUM}, _scan),
    _operator("cummax", _aten.cummax.default, _SELF_DIM, _extremes_so_far),
    _operator("cummin", _aten.cummin.default, _SELF_DIM, _extremes_so_far),
    _operator("logcumsumexp", _aten.logcumsumexp.default, _SELF_DIM, _scan_of_exponentials),
    _operator(
        "renorm",
        _aten.renorm.default,
        {"self": TENSOR, "p": number(1e-6), "dim": DIM, "maxnorm": number(0)},
        _renorm,
        rows.mixes,
    ),
    _operator(
        "cross",
        _aten.linalg_cross.default,
        {"self": TENSOR, "other": TENSOR, "dim": DIM},
        _cross,
        rows.mixes,
    ),
    _operator(
        "topk",
        _aten.topk.default,
        {"self": TENSOR, "k": COUNT, "dim": DIM, "largest": BOOL, "sorted": BOOL},
        _topk,
    ),
    _operator("sort", _aten.sort.default, _SORT, _sort),
    _operator("sort_stable", _aten.sort.stable, {**_SORT, "stable": optional(BOOL)}, _sort),
    _operator(
        "bucketize",
        _aten.bucketize.Tensor,
        {"self": TENSOR, "boundaries": TENSOR, **_INTERVAL},
        _bucketize,
        _all_but_boundaries,
    ),
    _operator(
        "searchsorted",
        _aten.searchsorted.Tensor,
        {"sorted_sequence": TENSOR, "self": TENSOR, **_INTERVAL},
        _searchsorted,
        rows.mixes,
    ),
]
