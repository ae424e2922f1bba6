"""Operators that move values: shapes, parts, joins and repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import (
    COUNT,
    DIM,
    DIMS,
    PART,
    PARTS,
    SHAPE,
    TENSOR,
    TENSORS,
    Kind,
    integer,
    integers,
    optional,
)
from biper_engine.graph.operator import Numbers, Operator, Result, Rule, passing
from biper_engine.graph.sizes import ImagesSize, MisfitError, Size, divided, product
from biper_engine.graph.values import ANY, MAX_RANK, Value, axes, axis, require, require_dtype

__all__ = ["OPERATORS"]

_aten = torch.ops.aten

_END = (1 << 63) - 1
_MOST_PARTS = 1024

_POSITION = Kind(
    "an integer, or a size",
    lambda v: isinstance(v, ImagesSize) or (type(v) is int and -_END <= v <= _END),
)
_SELF_DIM = {"self": TENSOR, "dim": DIM}


def _operator(
    name: str, target: Any, arguments: dict[str, Kind], result: Rule, batching: Any = rows.mixes
) -> Operator:
    return Operator(name=name, target=target, arguments=arguments, result=result, rows=batching)


def _moved(x: Value, *shape: Size) -> Value:
    """Return the values of `x`, or some of them, in another shape."""
    require_dtype("self", x, ANY)
    return Value(x.dtype, shape, limits=x.limits)


def _replaced(x: Value, at: int, *sizes: Size) -> tuple[Size, ...]:
    """Return the shape of `x` with other sizes in place of dimension `at`."""
    return (*x.shape[:at], *sizes, *x.shape[at + 1 :])


# -- shapes ----------------------------------------------------------------------------------------


def _reshape(self: Value, shape: Sequence[Size]) -> Value:
    sizes = list(shape)
    unknown = [at for at, size in enumerate(sizes) if size == -1]
    require(len(unknown) <= 1, f"`shape` (={sizes}) has more than one -1")
    values = product(self.shape)
    if unknown:
        known = product(size for size in sizes if size != -1)
        sizes[unknown[0]] = divided(values, known)
    require(product(sizes) == values, f"`self` (={self}) cannot have the shape {_text(sizes)}")
    found = _moved(self, *sizes)
    return Value(found.dtype, found.shape, limits=found.limits, dense=self.dense)


def _text(sizes: Sequence[Size]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _permute(self: Value, dims: Sequence[int]) -> Value:
    require(len(dims) == self.rank, f"`dims` (={list(dims)}) of `self` (={self})")
    return _moved(self, *(self.shape[at] for at in axes(dims, self.rank)))


def _expand(self: Value, size: Sequence[Size]) -> Value:
    new = len(size) - self.rank
    require(new >= 0, f"`size` (={_text(size)}) of `self` (={self})")
    sizes = list(size)
    for at, wanted in enumerate(sizes):
        if at < new:
            require(wanted != -1, f"`size` (={_text(size)}) of `self` (={self})")
            continue
        old = self.shape[at - new]
        sizes[at] = old if wanted == -1 else wanted
        require(sizes[at] == old or old == 1, f"`size` (={_text(size)}) of `self` (={self})")
    return _moved(self, *sizes)


def _squeeze(self: Value, dim: Sequence[int]) -> Value:
    gone = [at for at in axes(dim, self.rank) if self.shape[at] == 1]
    # A size that grows with the batch is 1 for one image.
    for at in axes(dim, self.rank):
        require(not isinstance(self.shape[at], ImagesSize), f"`dim` names the batch of {self}")
    return _moved(self, *(size for at, size in enumerate(self.shape) if at not in gone))


def _unsqueeze(self: Value, dim: int) -> Value:
    at = axis(dim, self.rank + 1)
    return _moved(self, *self.shape[:at], 1, *self.shape[at:])


def _pixel_shuffle(self: Value, upscale_factor: int) -> Value:
    require(self.rank >= 3, f"`self` (={self}) is not a map")
    *front, channels, height, width = self.shape
    factor = upscale_factor
    inner = divided(channels, factor * factor)
    return _moved(self, *front, inner, height * factor, width * factor)


def _pixel_unshuffle(self: Value, downscale_factor: int) -> Value:
    require(self.rank >= 3, f"`self` (={self}) is not a map")
    *front, channels, height, width = self.shape
    factor = downscale_factor
    return _moved(
        self, *front, channels * factor * factor, divided(height, factor), divided(width, factor)
    )


def _channel_shuffle(self: Value, groups: int) -> Value:
    require(self.rank >= 3, f"`self` (={self}) is not a map")
    divided(self.shape[1], groups)
    return _moved(self, *self.shape)


# -- parts -----------------------------------------------------------------------------------------


def _length(size: Size, start: Any, end: Any, step: int) -> Size:
    """Return the number of positions from `start` to `end`, both as in Python's slices."""
    first, last = (_position(at, size) for at in (start or 0, size if end is None else end))
    if first == 0 and last == size and step == 1:
        return size
    span = last - first
    if isinstance(span, ImagesSize):
        return divided(span, step)
    return max(0, -(-span // step))


def _position(at: Any, size: Size) -> Size:
    if at == size or (type(at) is int and at >= 1 << 31):
        return size
    if isinstance(at, ImagesSize):
        inside = isinstance(size, ImagesSize) and size >= at
        require(inside, f"position {at} of {size}")
        return at
    if isinstance(size, int) and isinstance(at, int):
        return min(max(at + size * (at < 0), 0), size)
    if type(at) is int and at <= 0:
        # Counted from the end of a size that grows: small batches would have no such position.
        require(at == 0 or size + at >= 0, f"position {at} of {size}")
        return 0 if at == 0 else size + at
    require(size >= at if isinstance(at, int) else False, f"position {at} of {size}")
    return at  # type: ignore[no-any-return]


def _slice(self: Value, dim: int, start: Any, end: Any, step: int) -> Value:
    at = axis(dim, self.rank)
    return _moved(self, *_replaced(self, at, _length(self.shape[at], start, end, step)))


def _select(self: Value, dim: int, index: int) -> Value:
    at = axis(dim, self.rank)
    _require_index(self, at, index)
    return _moved(self, *_replaced(self, at))


def _require_index(x: Value, at: int, index: int) -> None:
    size = x.shape[at]
    fits = size >= index + 1 if index >= 0 else size >= -index
    require(fits, f"`index` (={index}) is outside dimension {at} of `self` (={x})")


def _split(self: Value, split_size: Size, dim: int) -> tuple[Value, ...]:
    at = axis(dim, self.rank)
    size = self.shape[at]
    if isinstance(split_size, ImagesSize):
        parts = divided(size, split_size)
        if not isinstance(parts, int) or parts > _MOST_PARTS:
            raise MisfitError(f"{parts} parts of {split_size} in `self` (={self})")
        return (_moved(self, *_replaced(self, at, split_size)),) * parts
    if not isinstance(size, int):
        raise MisfitError(f"`self` (={self}) has no fixed number of parts")
    starts = range(0, max(size, 1), split_size)
    require(len(starts) <= _MOST_PARTS, f"`self` (={self}) has {len(starts)} parts")
    return tuple(
        _moved(self, *_replaced(self, at, min(split_size, size - first))) for first in starts
    )


def _split_sizes(self: Value, split_sizes: Sequence[Size], dim: int) -> tuple[Value, ...]:
    at = axis(dim, self.rank)
    total: Size = 0
    for size in split_sizes:
        total = size + total
    fits = total == self.shape[at]
    require(fits, f"`split_sizes` (={list(split_sizes)}) do not add up to `self` (={self})")
    return tuple(_moved(self, *_replaced(self, at, size)) for size in split_sizes)


def _unbind(self: Value, dim: int) -> tuple[Value, ...]:
    at = axis(dim, self.rank)
    size = self.shape[at]
    if not isinstance(size, int) or size > _MOST_PARTS:
        raise MisfitError(f"`self` (={self}) has no fixed number of parts, or too many")
    part = _moved(self, *_replaced(self, at))
    part = Value(part.dtype, part.shape, limits=part.limits, dense=self.dense and at == 0)
    return (part,) * size


def _unfold(self: Value, dimension: int, size: int, step: int) -> Value:
    at = axis(dimension, self.rank)
    whole = self.shape[at]
    if not isinstance(whole, int) or whole < size:
        raise MisfitError(f"windows of {size} do not fit `self` (={self})")
    return _moved(self, *_replaced(self, at, (whole - size) // step + 1), size)


# -- joins and repeats -----------------------------------------------------------------------------


def _joined(tensors: Sequence[Value]) -> tuple[torch.dtype, tuple[int, int] | None]:
    for tensor in tensors:
        require_dtype("tensors", tensor, ANY)
    limits = [tensor.limits for tensor in tensors if tensor.limits is not None]
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if len(limits) < len(tensors) or dtype.is_floating_point:
        return dtype, None
    return dtype, (min(low for low, _ in limits), max(high for _, high in limits))


def _cat(tensors: Sequence[Value], dim: int) -> Value:
    dtype, limits = _joined(tensors)
    first = tensors[0]
    at = axis(dim, first.rank)
    total: Size = 0
    for tensor in tensors:
        fits = tensor.rank == first.rank and _replaced(tensor, at) == _replaced(first, at)
        require(fits, f"`tensors` has {first} and {tensor}, which cannot be joined")
        total = tensor.shape[at] + total
    return Value(dtype, _replaced(first, at, total), limits=limits)


def _stack(tensors: Sequence[Value], dim: int) -> Value:
    dtype, limits = _joined(tensors)
    first = tensors[0]
    for tensor in tensors:
        require(tensor.shape == first.shape, f"`tensors` has {first} and {tensor}")
        require(tensor.dtype == first.dtype, f"`tensors` has {first} and {tensor}")
    at = axis(dim, first.rank + 1)
    return Value(dtype, (*first.shape[:at], len(tensors), *first.shape[at:]), limits=limits)


def _flip(self: Value, dims: Sequence[int]) -> Value:
    axes(dims, self.rank)
    return _moved(self, *self.shape)


def _roll(self: Value, shifts: Sequence[int], dims: Sequence[int]) -> Value:
    axes(dims, self.rank)
    fits = len(shifts) == len(dims) or (not dims and len(shifts) == 1)
    require(fits, f"`shifts` (={list(shifts)}) and `dims` (={list(dims)}) differ in length")
    return _moved(self, *self.shape)


def _rot90(self: Value, k: int, dims: Sequence[int]) -> Value:
    first, second = axes(dims, self.rank)
    sizes = list(self.shape)
    if k % 2:
        sizes[first], sizes[second] = sizes[second], sizes[first]
    return _moved(self, *sizes)


def _repeat(self: Value, repeats: Sequence[Size]) -> Value:
    new = len(repeats) - self.rank
    require(new >= 0, f"`repeats` (={_text(repeats)}) of `self` (={self})")
    sizes = (1,) * new + self.shape
    require(-1 not in repeats, f"`repeats` (={_text(repeats)}) must be at least 0")
    return _moved(self, *(size * times for size, times in zip(sizes, repeats, strict=True)))


def _put(self: Value, src: Value, part: Result) -> Value:
    assert isinstance(part, Value)
    fits = src.dtype == self.dtype and src.shape == part.shape
    require(fits, f"`src` must be {part}, but it is {src}")
    return Value(self.dtype, self.shape)


def _slice_scatter(self: Value, src: Value, dim: int, start: Any, end: Any, step: int) -> Value:
    return _put(self, src, _slice(self, dim, start, end, step))


def _select_scatter(self: Value, src: Value, dim: int, index: int) -> Value:
    return _put(self, src, _select(self, dim, index))


# -- rows ------------------------------------------------------------------------------------------


def _reshape_rows(named: Mapping[str, Any], result: Any) -> bool:
    """Whether rows stay rows: they do if both shapes begin with the batch."""
    return rows.first_flows(named, result)


def _permute_rows(named: Mapping[str, Any], result: Any) -> bool:
    return rows.first_flows(named, result) and named["dims"][0] % result.rank == 0


def _expand_rows(named: Mapping[str, Any], result: Any) -> bool:
    return rows.first_flows(named, result) and named["self"].rank == len(named["size"])


def _dims_rows(named: Mapping[str, Any], result: Any) -> bool:
    dims = named["dims"]
    return rows.first_flows(named, result) and bool(dims) and 0 not in axes(dims, result.rank)


def _repeat_rows(named: Mapping[str, Any], result: Any) -> bool:
    repeats = named["repeats"]
    same = len(repeats) == named["self"].rank and repeats[0] == 1
    return rows.first_flows(named, result) and same


def _matrix_rows(named: Mapping[str, Any], result: Any) -> bool:
    return rows.first_flows(named, result) and result.rank >= 3


_SLICE = {**_SELF_DIM, "start": optional(_POSITION), "end": optional(_POSITION), "step": COUNT}
_OFFSET = integer(-(1 << 31))
_DIMS = {"self": TENSOR, "dims": DIMS}

_MOVED = [
    _operator(
        "reshape", _aten.reshape.default, {"self": TENSOR, "shape": SHAPE}, _reshape, _reshape_rows
    ),
    _operator("permute", _aten.permute.default, _DIMS, _permute, _permute_rows),
    _operator(
        "expand", _aten.expand.default, {"self": TENSOR, "size": SHAPE}, _expand, _expand_rows
    ),
    _operator(
        "pixel_shuffle",
        _aten.pixel_shuffle.default,
        {"self": TENSOR, "upscale_factor": integer(1, 1 << 15)},
        _pixel_shuffle,
        _matrix_rows,
    ),
    _operator(
        "pixel_unshuffle",
        _aten.pixel_unshuffle.default,
        {"self": TENSOR, "downscale_factor": integer(1, 1 << 15)},
        _pixel_unshuffle,
        _matrix_rows,
    ),
    _operator(
        "channel_shuffle",
        _aten.channel_shuffle.default,
        {"self": TENSOR, "groups": COUNT},
        _channel_shuffle,
        _matrix_rows,
    ),
    _operator("slice", _aten.slice.Tensor, _SLICE, _slice, rows.over_dims),
    _operator(
        "select",
        _aten.select.int,
        {**_SELF_DIM, "index": integer(-(1 << 31))},
        _select,
        rows.over_dims,
    ),
    _operator("flip", _aten.flip.default, _DIMS, _flip, _dims_rows),
    _operator(
        "roll",
        _aten.roll.default,
        {"self": TENSOR, "shifts": integers(range(1, MAX_RANK + 1), -(1 << 31)), "dims": DIMS},
        _roll,
        _dims_rows,
    ),
    _operator(
        "rot90",
        _aten.rot90.default,
        {"self": TENSOR, "k": _OFFSET, "dims": integers((2,), -MAX_RANK, MAX_RANK - 1)},
        _rot90,
        _dims_rows,
    ),
    _operator(
        "repeat", _aten.repeat.default, {"self": TENSOR, "repeats": SHAPE}, _repeat, _repeat_rows
    ),
    _operator(
        "unfold",
        _aten.unfold.default,
        {"self": TENSOR, "dimension": DIM, "size": COUNT, "step": COUNT},
        _unfold,
    ),
]

_SPLIT = [
    _operator(
        "split",
        _aten.split.Tensor,
        {"self": TENSOR, "split_size": PART, "dim": DIM},
        _split,
        rows.over_dims,
    ),
    _operator(
        "split_sizes",
        _aten.split_with_sizes.default,
        {"self": TENSOR, "split_sizes": PARTS, "dim": DIM},
        _split_sizes,
        rows.over_dims,
    ),
    _operator("unbind", _aten.unbind.int, _SELF_DIM, _unbind, rows.over_dims),
]

_JOINED = [
    _operator("cat", _aten.cat.default, {"tensors": TENSORS, "dim": DIM}, _cat, rows.cat),
    _operator("stack", _aten.stack.default, {"tensors": TENSORS, "dim": DIM}, _stack, rows.cat),
]

OPERATORS: list[Operator] = [
    *passing(Numbers.MOVED, _MOVED),
    *passing(Numbers.SPLIT, _SPLIT),
    *passing(Numbers.JOINED, _JOINED),
    _operator(
        "squeeze", _aten.squeeze.dims, {"self": TENSOR, "dim": DIMS}, _squeeze, rows.over_dims
    ),
    _operator("unsqueeze", _aten.unsqueeze.default, _SELF_DIM, _unsqueeze, rows.unless_first),
    _operator(
        "unsafe_split",
        _aten.unsafe_split.Tensor,
        {"self": TENSOR, "split_size": PART, "dim": DIM},
        _split,
        rows.over_dims,
    ),
    _operator(
        "slice_scatter",
        _aten.slice_scatter.default,
        {"self": TENSOR, "src": TENSOR, **_SLICE},
        _slice_scatter,
    ),
    _operator(
        "select_scatter",
        _aten.select_scatter.default,
        {"self": TENSOR, "src": TENSOR, "dim": DIM, "index": integer(-(1 << 31))},
        _select_scatter,
    ),
]
