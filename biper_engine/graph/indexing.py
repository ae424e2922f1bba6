"""Operators that take values by their positions.

Positions that a network holds, or that an operator such as argmax returns, must be known to be in
range, or the network is refused. PyTorch checks the others, such as tokens that a caller passes, in
each call and raises IndexError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import (
    BOOL,
    DIM,
    FALSE,
    INDEX,
    SIZE,
    TENSOR,
    Kind,
    integer,
)
from biper_engine.graph.operator import Numbers, Operator, Rule, passing
from biper_engine.graph.sizes import Size, product
from biper_engine.graph.values import ANY, FLOATS, Value, axis, broadcast, require, require_dtype

__all__ = ["OPERATORS", "indexed_shape", "require_elements_of", "require_positions"]

_aten = torch.ops.aten

_POSITIONS = (torch.int64, torch.int32)


def _known_limits(x: Value) -> tuple[int, int] | None:
    """Return the smallest and the largest integer of a value, if they are known."""
    if x.constant is None or x.constant.numel() == 0:
        return x.limits
    low, high = torch.aminmax(x.constant)
    return int(low), int(high)


def require_positions(
    name: str, index: Value, size: Size, *, negative: bool = False, dtypes: Any = _POSITIONS
) -> None:
    """Require that positions, as far as they are known, are inside a dimension."""
    require_dtype(name, index, dtypes)
    limits = _known_limits(index)
    if limits is None:
        return
    low, high = limits
    fits = size >= high + 1 and (low >= 0 or (negative and size >= -low))
    require(fits, f"`{name}` has positions from {low} to {high} in a dimension of {size}")


def _embedding(weight: Value, indices: Value, **options: Any) -> Value:
    require_dtype("weight", weight, FLOATS)
    require(weight.rank == 2, f"`weight` is {weight}")
    require_positions("indices", indices, weight.shape[0])
    return weight.like(*indices.shape, weight.shape[1])


def _index_select(self: Value, dim: int, index: Value) -> Value:
    require_dtype("self", self, ANY)
    require(index.rank == 1 and self.rank >= 1, f"`index` is {index}, `self` {self}")
    at = axis(dim, self.rank)
    require_positions("index", index, self.shape[at])
    return self.like(*self.shape[:at], index.shape[0], *self.shape[at + 1 :])


def require_elements_of(self: Value, dim: int, index: Value) -> None:
    """Require that `index` names an element of `self` along `dim` at each of its own places."""
    require_dtype("self", self, ANY)
    require(index.rank == self.rank >= 1, f"`index` is {index}, `self` {self}")
    at = axis(dim, self.rank)
    require_positions("index", index, self.shape[at], dtypes=_POSITIONS[:1])
    for other, (whole, wanted) in enumerate(zip(self.shape, index.shape, strict=True)):
        fits = other == at or whole == wanted or (isinstance(wanted, int) and whole >= wanted)
        require(fits, f"`index` (={index}) is larger than `self` (={self})")


def _gather(self: Value, dim: int, index: Value, sparse_grad: bool) -> Value:
    require_elements_of(self, dim, index)
    return self.like(*index.shape)


def indexed_shape(self: Value, indices: Sequence[Value | None]) -> tuple[Size, ...]:
    """Return the shape of `self[indices]`, whose positions must be inside `self`."""
    require_dtype("self", self, ANY)
    require(len(indices) <= self.rank, f"{len(indices)} indices for `self` (={self})")
    taken = [at for at, index in enumerate(indices) if index is not None]
    require(bool(taken), "`indices` has no index")
    for at in taken:
        index = indices[at]
        assert index is not None
        require_positions("indices", index, self.shape[at], negative=True)
    shape = broadcast(*(index.shape for index in indices if index is not None))
    rest = [size for at, size in enumerate(self.shape) if at not in taken]
    together = taken == list(range(taken[0], taken[-1] + 1))
    front = taken[0] if together else 0
    return (*rest[:front], *shape, *rest[front:])


def _index(self: Value, indices: Sequence[Value | None]) -> Value:
    return self.like(*indexed_shape(self, indices))


def _grid_sample(count: int) -> Rule:
    """Return the rule of a sample at the positions in `grid`, along so many axes."""

    def rule(input: Value, grid: Value, **options: Any) -> Value:
        require_dtype("input", input, FLOATS[:1])
        require(grid.dtype == input.dtype, f"`grid` must be {input.dtype}, but it is {grid}")
        fits = input.rank == grid.rank == count + 2 and grid.shape[0] == input.shape[0]
        fits = fits and grid.shape[-1] == count
        require(fits, f"`grid` (={grid}) does not fit `input` (={input})")
        for size in input.shape:
            require(size >= 1, f"`input` (={input}) is empty")
        return input.like(*input.shape[:2], *grid.shape[1:-1])

    return rule


def _affine_grid(theta: Value, size: Sequence[Size], align_corners: bool) -> Value:
    require_dtype("theta", theta, FLOATS[:1])
    count = len(size) - 2
    require(-1 not in size, f"`size` (={list(size)}) must be the size of a map")
    require(theta.shape == (size[0], count, count + 1), f"`theta` is {theta}")
    for item in size:
        require(item >= 1, f"`size` (={list(size)}) is empty")
    return theta.like(size[0], *size[2:], count)


def _take(self: Value, index: Value) -> Value:
    require_dtype("self", self, ANY)
    require_positions("index", index, product(self.shape), dtypes=_POSITIONS[:1], negative=True)
    return self.like(*index.shape)


# -- rows ------------------------------------------------------------------------------------------


def _of_constants(named: Mapping[str, Any], result: Any) -> bool:
    """Require that only positions are computed."""
    return not named["weight"].flows and named["indices"].flows


def _constant_index(named: Mapping[str, Any], result: Any) -> bool:
    """Require constant positions, along a dimension other than the first."""
    return rows.over_dims(named, result)


def _not_the_batch(named: Mapping[str, Any], result: Any) -> bool:
    return rows.first_flows(named, result) and named["indices"][0] is None


def _gather_rows(named: Mapping[str, Any], result: Any) -> bool:
    return rows.all_flow(named, result) and named["dim"] % result.rank != 0


_AT = {"self": TENSOR, "dim": DIM, "index": TENSOR}
_FROM_0 = integer(0, 2)


def _operator(
    name: str, target: Any, arguments: dict[str, Kind], result: Rule, batching: Any = rows.mixes
) -> Operator:
    return Operator(name=name, target=target, arguments=arguments, result=result, rows=batching)


_MOVED = [
    _operator("index_select", _aten.index_select.default, _AT, _index_select, _constant_index),
    _operator(
        "index", _aten.index.Tensor, {"self": TENSOR, "indices": INDEX}, _index, _not_the_batch
    ),
    _operator(
        "take_positions",
        _aten._unsafe_index.Tensor,
        {"self": TENSOR, "indices": INDEX},
        _index,
        _not_the_batch,
    ),
]

OPERATORS: list[Operator] = [
    *passing(Numbers.MOVED, _MOVED),
    _operator(
        "embedding",
        _aten.embedding.default,
        {
            **{"weight": TENSOR, "indices": TENSOR, "padding_idx": integer(-1)},
            **dict.fromkeys(("scale_grad_by_freq", "sparse"), BOOL),
        },
        _embedding,
        _of_constants,
    ),
    _operator("gather", _aten.gather.default, {**_AT, "sparse_grad": FALSE}, _gather, _gather_rows),
    _operator(
        "grid_sample",
        _aten.grid_sampler_2d.default,
        {
            **{"input": TENSOR, "grid": TENSOR},
            **{"interpolation_mode": _FROM_0, "padding_mode": _FROM_0, "align_corners": BOOL},
        },
        _grid_sample(2),
    ),
    _operator(
        "grid_sample_3d",
        _aten.grid_sampler_3d.default,
        {
            **{"input": TENSOR, "grid": TENSOR, "interpolation_mode": integer(0, 1)},
            **{"padding_mode": _FROM_0, "align_corners": BOOL},
        },
        _grid_sample(3),
    ),
    _operator("take", _aten.take.default, {"self": TENSOR, "index": TENSOR}, _take),
    _operator(
        "affine_grid",
        _aten.affine_grid_generator.default,
        {
            **{"theta": TENSOR, "align_corners": BOOL},
            "size": Kind(
                "four or five sizes",
                lambda v: (
                    isinstance(v, list | tuple) and len(v) in (4, 5) and all(map(SIZE.accepts, v))
                ),
            ),
        },
        _affine_grid,
    ),
]
