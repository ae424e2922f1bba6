"""Reductions over several dimensions, or all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import (
    BOOL,
    DIMS,
    DTYPE,
    TENSOR,
    Kind,
    integers,
    number,
    optional,
)
from biper_engine.graph.operator import Numbers, Operator, Result, Rule, passing
from biper_engine.graph.sizes import Size
from biper_engine.graph.values import (
    ANY,
    FLOATS,
    MAX_RANK,
    NUMBERS,
    Value,
    axes,
    broadcast,
    require,
    require_dtype,
    same_dtype,
)

__all__ = [
    "OPERATORS",
    "TRUTH",
    "WIDE",
    "reduced",
    "require_accumulating",
    "require_elements",
    "sum_dtype",
]

_aten = torch.ops.aten


def _operator(
    name: str, target: Any, arguments: dict[str, Kind], result: Rule, batching: Any = rows.over_dims
) -> Operator:
    return Operator(name=name, target=target, arguments=arguments, result=result, rows=batching)


def reduced(x: Value, dims: Sequence[int], keepdim: bool) -> tuple[Size, ...]:
    """Return the shape without some dimensions, or with 1 in their place."""
    gone = set(axes(dims, x.rank))
    return tuple(
        1 if at in gone else size for at, size in enumerate(x.shape) if keepdim or at not in gone
    )


def require_elements(x: Value, dims: Sequence[int]) -> None:
    """Require at least one element along every one of some dimensions."""
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

    def rule(
        self: Value,
        dim: Any,
        keepdim: bool = False,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Value:
        require_dtype("self", self, dtypes)
        dims = list(dim or range(self.rank))
        if needs_elements:
            require_elements(self, dims)
        require_accumulating(self, dtype)
        return Value(dtype or dtype_of(self.dtype), reduced(self, dims, keepdim))

    return rule


def require_accumulating(x: Value, dtype: torch.dtype | None) -> None:
    """Require that a sum may be computed in a dtype, or that none is given."""
    require(dtype is None or dtype in _ACCUMULATING, f"`dtype` is {dtype}")
    wide = dtype is None or dtype.is_floating_point or not x.dtype.is_floating_point
    require(wide, f"`dtype` (={dtype}) of `self` (={x})")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and products if none is given."""
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


WIDE = (torch.float32, torch.float64)
_ACCUMULATING = (torch.float32, torch.float64, torch.int64, torch.int32)

_mean = _over(FLOATS)
_sum = _over(ANY, sum_dtype)
_extreme = _over(NUMBERS, needs_elements=True)
TRUTH = tuple(dtype for dtype in ANY if dtype != torch.uint8)  # uint8 results stay uint8
_truth = _over(TRUTH, lambda dtype: torch.bool)


def _truth_over(self: Value, dim: Any, keepdim: bool) -> Value:
    require(dim is None or len(dim) > 0, "`dim` is empty")  # which is no dimension for these
    found = _truth(self=self, dim=dim, keepdim=keepdim)
    assert isinstance(found, Value)
    return found


_DIMS = {"self": TENSOR, "dim": optional(DIMS), "keepdim": BOOL}
_SOME_DIMS = integers(range(1, MAX_RANK + 1), -MAX_RANK, MAX_RANK - 1)
_COUNTED = {"self": TENSOR, "dim": DIMS}
_SUM = {"dtype": optional(DTYPE)}
_SPREAD = {**_DIMS, "correction": optional(number(0, 1 << 20))}


def _counted(self: Value, dim: Any) -> Value:
    require_dtype("self", self, ANY)
    return Value(torch.int64, reduced(self, list(dim or range(self.rank)), False))


def _distance(self: Value, other: Value, p: Any) -> Value:
    same_dtype(WIDE, self=self, other=other)
    broadcast(self.shape, other.shape)
    return self.like()


def _norm(self: Value, ord: Any, dim: Any, keepdim: bool) -> Value:
    require_dtype("self", self, FLOATS)
    dims = list(dim or range(self.rank))
    if isinstance(ord, float) and ord == float("inf"):
        require_elements(self, dims)
    return Value(self.dtype, reduced(self, dims, keepdim))


def _norm_of_order(self: Value, p: Any, dim: Any, keepdim: bool) -> Value:
    return _norm(self, p, dim, keepdim)


_NORM_ORDER = Kind(
    "1, 2, inf or another number from 0", lambda v: type(v) in (int, float) and v >= 0
)

_LARGEST = [
    _operator("amax", _aten.amax.default, {**_DIMS, "dim": DIMS}, _extreme),
    _operator("amin", _aten.amin.default, {**_DIMS, "dim": DIMS}, _extreme),
]

OPERATORS: list[Operator] = [
    *passing(Numbers.LARGEST, _LARGEST),
    _operator("mean", _aten.mean.dim, {**_DIMS, **_SUM}, _mean),
    _operator("sum", _aten.sum.dim_IntList, {**_DIMS, **_SUM}, _sum),
    _operator("nan_sum", _aten.nansum.default, {**_DIMS, **_SUM}, _over(FLOATS)),
    _operator("count_nonzero", _aten.count_nonzero.dim_IntList, _COUNTED, _counted),
    _operator("any_over", _aten.any.dims, _DIMS, _truth_over),
    _operator("all_over", _aten.all.dims, _DIMS, _truth_over),
    _operator("variance", _aten.var.correction, _SPREAD, _mean),
    _operator("deviation", _aten.std.correction, _SPREAD, _mean),
    _operator("variance_mean", _aten.var_mean.correction, _SPREAD, _pair_over),
    _operator("deviation_mean", _aten.std_mean.correction, _SPREAD, _pair_over),
    _operator("logsumexp", _aten.logsumexp.default, {**_DIMS, "dim": _SOME_DIMS}, _mean),
    _operator(
        "norm",
        _aten.linalg_vector_norm.default,
        {"self": TENSOR, "ord": _NORM_ORDER, **_DIMS},
        _norm,
    ),
    _operator(
        "norm_of_order",
        _aten.norm.ScalarOpt_dim,
        {"self": TENSOR, "p": _NORM_ORDER, **_DIMS, "dim": DIMS},
        _norm_of_order,
    ),
    _operator(
        "distance",
        _aten.dist.default,
        {"self": TENSOR, "other": TENSOR, "p": number(0)},
        _distance,
        rows.mixes,
    ),
    _operator("mean_all", _aten.mean.default, {"self": TENSOR}, _whole(_mean), rows.mixes),
    _operator("sum_all", _aten.sum.default, {"self": TENSOR}, _whole(_sum), rows.mixes),
    _operator("max_all", _aten.max.default, {"self": TENSOR}, _whole(_extreme), rows.mixes),
    _operator("min_all", _aten.min.default, {"self": TENSOR}, _whole(_extreme), rows.mixes),
    _operator("any_all", _aten.any.default, {"self": TENSOR}, _whole(_truth), rows.mixes),
    _operator("all_all", _aten.all.default, {"self": TENSOR}, _whole(_truth), rows.mixes),
]
