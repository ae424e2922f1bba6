"""Operators that return a tensor with other values at some positions.

Positions are checked as in `indexing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import BOOL, DIM, INDEX, NUMBER, TENSOR, Kind, choice, integers
from biper_engine.graph.elementwise import require_range
from biper_engine.graph.indexing import indexed_shape, require_elements_of, require_positions
from biper_engine.graph.operator import Operator, Rule
from biper_engine.graph.sizes import ImagesSize, MisfitError, product
from biper_engine.graph.values import (
    ANY,
    BOOLS,
    FLOATS,
    NUMBERS,
    Value,
    axis,
    broadcast,
    require,
    require_dtype,
)

__all__ = ["OPERATORS"]

_aten = torch.ops.aten


def _operator(
    name: str, target: Any, arguments: dict[str, Kind], result: Rule, batching: Any = rows.mixes
) -> Operator:
    return Operator(name=name, target=target, arguments=arguments, result=result, rows=batching)


def _scatter(self: Value, dim: int, index: Value, **source: Any) -> Value:
    require_elements_of(self, dim, index)
    for size in index.shape:
        require(isinstance(size, ImagesSize) or size >= 1, f"`index` is {index}")
    src = source.get("src")
    require_range(self.dtype, source.get("value"))
    if src is not None:
        fits = src.dtype == self.dtype and src.shape == index.shape
        require(fits, f"`src` must be {self.dtype} like `index` (={index}), but it is {src}")
    return self.like(*self.shape)


def _scatter_numbers(self: Value, dim: int, index: Value, src: Value, **options: Any) -> Value:
    require_dtype("self", self, NUMBERS)
    return _scatter(self, dim, index, src=src)


def _scatter_reduced(
    self: Value, dim: int, index: Value, src: Value, reduce: str, include_self: bool
) -> Value:
    require_dtype("self", self, FLOATS)
    return _scatter(self, dim, index, src=src)


def _index_add(self: Value, dim: int, index: Value, source: Value, alpha: Any) -> Value:
    require_dtype("self", self, FLOATS)
    at = _require_places(self, dim, index)
    wanted = (*self.shape[:at], index.shape[0], *self.shape[at + 1 :])
    fits = source.dtype == self.dtype and source.shape == wanted
    require(fits, f"`source` must be {self.like(*wanted)}, but it is {source}")
    return self.like(*self.shape)


def _require_places(self: Value, dim: int, index: Value, dtypes: Any = (torch.int64,)) -> int:
    require(index.rank == 1 and self.rank >= 1, f"`index` is {index}, `self` {self}")
    at = axis(dim, self.rank)
    require_positions("index", index, self.shape[at], dtypes=dtypes)
    return at


def _index_copy(self: Value, dim: int, index: Value, source: Value) -> Value:
    require_dtype("self", self, ANY)
    at = _require_places(self, dim, index)
    wanted = (*self.shape[:at], index.shape[0], *self.shape[at + 1 :])
    fits = source.dtype == self.dtype and source.shape == wanted
    require(fits, f"`source` must be {self.like(*wanted)}, but it is {source}")
    return self.like(*self.shape)


def _index_fill(self: Value, dim: int, index: Value, value: Any) -> Value:
    require_dtype("self", self, ANY)
    _require_places(self, dim, index)
    if isinstance(value, Value):
        fits = not value.shape and value.dtype == self.dtype
        require(fits, f"`value` must be one {self.dtype}, but it is {value}")
    else:
        require(not isinstance(value, ImagesSize), f"`value` is {value}")
        whole = self.dtype.is_floating_point or isinstance(value, int)
        require(whole, f"`value` (={value}) for {self}")
        require_range(self.dtype, value)
    return self.like(*self.shape)


def _index_put(
    self: Value, indices: Sequence[Value | None], values: Value, accumulate: bool
) -> Value:
    shape = indexed_shape(self, indices)
    fits = values.dtype == self.dtype and broadcast(values.shape, shape) == shape
    require(fits, f"`values` must be {self.like(*shape)}, but it is {values}")
    require(not accumulate or self.dtype.is_floating_point, f"sums in `self` (={self})")
    return self.like(*self.shape)


def _masked_scatter(self: Value, mask: Value, source: Value) -> Value:
    require_dtype("self", self, ANY)
    require_dtype("mask", mask, BOOLS)
    require(source.dtype == self.dtype, f"`source` must be {self.dtype}, but it is {source}")
    require(broadcast(self.shape, mask.shape) == self.shape, f"`mask` is {mask}, `self` {self}")
    enough = product(source.shape) == product(self.shape)
    require(enough, f"`source` (={source}) must have as many values as `self` (={self})")
    return self.like(*self.shape)


def _unpooled(count: int) -> Rule:
    """Return the rule of the inverse of a max pool, with the positions that the pool returned."""

    def rule(self: Value, indices: Value, output_size: Sequence[int], **options: Any) -> Value:
        require_dtype("self", self, (torch.float32, torch.float64))
        require(self.rank == count + 2, f"`self` must have {count + 2} dimensions, is {self}")
        require(indices.shape == self.shape, f"`indices` is {indices}, `self` {self}")
        for size in self.shape[1:]:
            if not isinstance(size, int) or size < 1:
                raise MisfitError(f"`self` (={self}) has no fixed size that is at least 1")
        values = product(output_size)
        require_positions("indices", indices, values, dtypes=(torch.int64,))
        return self.like(*self.shape[:2], *output_size)

    return rule


_AT = {"self": TENSOR, "dim": DIM, "index": TENSOR}
_REDUCE = choice("sum", "prod", "mean", "amax", "amin")

OPERATORS: list[Operator] = [
    _operator("scatter", _aten.scatter.src, {**_AT, "src": TENSOR}, _scatter),
    _operator("scatter_value", _aten.scatter.value, {**_AT, "value": NUMBER}, _scatter),
    _operator("scatter_add", _aten.scatter_add.default, {**_AT, "src": TENSOR}, _scatter_numbers),
    _operator(
        "scatter_reduce",
        _aten.scatter_reduce.two,
        {**_AT, "src": TENSOR, "reduce": _REDUCE, "include_self": BOOL},
        _scatter_reduced,
    ),
    _operator(
        "index_add",
        _aten.index_add.default,
        {**_AT, "source": TENSOR, "alpha": NUMBER},
        _index_add,
    ),
    _operator("index_copy", _aten.index_copy.default, {**_AT, "source": TENSOR}, _index_copy),
    _operator("index_fill", _aten.index_fill.int_Scalar, {**_AT, "value": NUMBER}, _index_fill),
    _operator(
        "index_fill_tensor", _aten.index_fill.int_Tensor, {**_AT, "value": TENSOR}, _index_fill
    ),
    _operator(
        "index_put",
        _aten.index_put.default,
        {"self": TENSOR, "indices": INDEX, "values": TENSOR, "accumulate": BOOL},
        _index_put,
    ),
    _operator(
        "masked_scatter",
        _aten.masked_scatter.default,
        {**dict.fromkeys(("self", "mask", "source"), TENSOR)},
        _masked_scatter,
    ),
    _operator(
        "max_unpool2d",
        _aten.max_unpool2d.default,
        {**dict.fromkeys(("self", "indices"), TENSOR), "output_size": integers((2,), 1)},
        _unpooled(2),
    ),
    _operator(
        "max_unpool3d",
        _aten.max_unpool3d.default,
        {
            **dict.fromkeys(("self", "indices"), TENSOR),
            "output_size": integers((3,), 1),
            "stride": integers((3,), 1),
            "padding": integers((3,), 0),
        },
        _unpooled(3),
    ),
]
