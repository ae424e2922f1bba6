"""Operators that make values only from numbers and sizes, and operators on sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from biper_engine.graph.arguments import (
    DIM,
    DTYPE,
    LAYOUT,
    NUMBER,
    SHAPE,
    SIZE,
    TENSOR,
    Kind,
    optional,
)
from biper_engine.graph.operator import Numbers, Operator, Rule, passing
from biper_engine.graph.sizes import ImagesSize, Size, divided, floored, remainder
from biper_engine.graph.values import ANY, Value, axis, require, require_dtype

__all__ = ["OPERATORS"]

_aten = torch.ops.aten

_DTYPE = {"dtype": optional(DTYPE)}


def _limits(dtype: torch.dtype, number: Any) -> tuple[int, int] | None:
    return None if dtype.is_floating_point or type(number) is not int else (number, number)


def _require_holds(dtype: torch.dtype, number: Any) -> None:
    """Require a number that a dtype can hold, for every batch if it grows with the batch."""
    if isinstance(number, ImagesSize):
        wide = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
        require(dtype in wide, f"{number} does not fit {dtype} for every batch")
        return
    if dtype.is_floating_point:
        fits = math.isinf(number) or abs(number) <= torch.finfo(dtype).max
        require(fits, f"{number} does not fit {dtype}")
        return
    if dtype == torch.bool:
        return
    limits = torch.iinfo(dtype)
    fits = type(number) in (int, bool) and limits.min <= number <= limits.max
    require(fits, f"{number} does not fit {dtype}")


def _filled(size: Sequence[Size], dtype: torch.dtype, number: Any) -> Value:
    require(-1 not in size, "`size` must be at least 0")
    _require_holds(dtype, number)
    return Value(dtype, tuple(size), limits=_limits(dtype, number), dense=True)


def _constant(number: int) -> Any:
    def rule(size: Sequence[Size], dtype: torch.dtype | None) -> Value:
        return _filled(size, dtype or torch.float32, number)

    return rule


def _full(size: Sequence[Size], fill_value: Any, dtype: torch.dtype | None) -> Value:
    if dtype is None:
        kinds = {bool: torch.bool, float: torch.float32}
        dtype = kinds.get(type(fill_value), torch.int64)
    return _filled(size, dtype, fill_value)


def _like(self: Value, dtype: torch.dtype | None, number: Any) -> Value:
    require_dtype("self", self, ANY)
    wanted = dtype or self.dtype
    _require_holds(wanted, number)
    return Value(wanted, self.shape, limits=_limits(wanted, number))


def _constant_like(number: int) -> Any:
    def rule(self: Value, dtype: torch.dtype | None, **options: Any) -> Value:
        return _like(self, dtype, number)

    return rule


def _full_like(self: Value, fill_value: Any, dtype: torch.dtype | None, **options: Any) -> Value:
    return _like(self, dtype, fill_value)


def _new_constant(number: int) -> Any:
    def rule(self: Value, size: Sequence[Size], dtype: torch.dtype | None) -> Value:
        require_dtype("self", self, ANY)
        return _filled(size, dtype or self.dtype, number)

    return rule


def _new_full(self: Value, size: Any, fill_value: Any, dtype: torch.dtype | None) -> Value:
    require_dtype("self", self, ANY)
    return _filled(size, dtype or self.dtype, fill_value)


def _fill(self: Value, value: Any) -> Value:
    require_dtype("self", self, ANY)
    if isinstance(value, Value):
        require(not value.shape and value.dtype == self.dtype, f"`value` is {value}")
        return self.like(*self.shape)
    _require_holds(self.dtype, value)
    return self.like(*self.shape)


def _arange(end: Any, start: Any = 0, step: Any = 1, dtype: torch.dtype | None = None) -> Value:
    span = end - start
    count = divided(span, step) if isinstance(span, ImagesSize) else -(-span // step)
    require(count >= 0, f"there is nothing from {start} to {end}")
    wanted = dtype or torch.int64
    require(wanted != torch.bool, "a range cannot be of bools")
    limits = None
    if isinstance(start, int) and isinstance(end, int) and not wanted.is_floating_point:
        limits = (start, max(end - 1, start))
        _require_holds(wanted, limits[1])
    return Value(wanted, (count,), limits=limits, dense=True)


def _eye(n: Size, m: Size | None = None, dtype: torch.dtype | None = None) -> Value:
    return Value(dtype or torch.float32, (n, n if m is None else m), dense=True)


def _size_of(self: Value, dim: int) -> Size:
    return self.shape[axis(dim, self.rank)]


def _on_sizes(compute: Callable[[Any, Any], Size]) -> Rule:
    def rule(a: Any, b: Any) -> Size:
        found = compute(a, b)
        if isinstance(found, int):
            require(0 <= found < 1 << 31, f"{found} is not a size")
        return found

    return rule


_RANGE_END = {"end": SIZE, **_DTYPE}
_STEP = Kind("an integer from 1", lambda v: type(v) is int and 1 <= v < 1 << 31)
_SIZES = {"a": SIZE, "b": SIZE}


def _operator(
    name: str, target: Any, arguments: dict[str, Kind], result: Any, *also: Any
) -> Operator:
    return Operator(name=name, target=target, arguments=arguments, result=result, also=also)


def _same_for_every_row(named: Mapping[str, Any], result: Any) -> bool:
    """Return True: the rows are alike, and none is computed from an image."""
    return True


def _likes() -> list[Operator]:
    return [
        Operator(
            name=f"{name}_like",
            target=target,
            arguments={"self": TENSOR, **more, **_DTYPE, "memory_format": LAYOUT},
            result=rule,
            rows=_same_for_every_row,
            also=also,
        )
        for name, target, more, rule, also in (
            ("zeros", _aten.zeros_like.default, {}, _constant_like(0), (_aten.empty_like.default,)),
            ("ones", _aten.ones_like.default, {}, _constant_like(1), ()),
            ("full", _aten.full_like.default, {"fill_value": NUMBER}, _full_like, ()),
        )
    ]


_ELEMENTWISE = [
    *_likes(),
    _operator("fill", _aten.fill.Scalar, {"self": TENSOR, "value": NUMBER}, _fill),
    _operator("fill_tensor", _aten.fill.Tensor, {"self": TENSOR, "value": TENSOR}, _fill),
]

OPERATORS: list[Operator] = [
    *passing(Numbers.ELEMENTWISE, _ELEMENTWISE),
    _operator(
        "zeros",
        _aten.zeros.default,
        {"size": SHAPE, **_DTYPE},
        _constant(0),
        _aten.empty.memory_format,
    ),
    _operator("ones", _aten.ones.default, {"size": SHAPE, **_DTYPE}, _constant(1)),
    _operator("full", _aten.full.default, {"size": SHAPE, "fill_value": NUMBER, **_DTYPE}, _full),
    _operator(
        "new_zeros",
        _aten.new_zeros.default,
        {"self": TENSOR, "size": SHAPE, **_DTYPE},
        _new_constant(0),
        _aten.new_empty.default,
    ),
    _operator(
        "new_ones",
        _aten.new_ones.default,
        {"self": TENSOR, "size": SHAPE, **_DTYPE},
        _new_constant(1),
    ),
    _operator(
        "new_full",
        _aten.new_full.default,
        {"self": TENSOR, "size": SHAPE, "fill_value": NUMBER, **_DTYPE},
        _new_full,
    ),
    _operator("eye", _aten.eye.default, {"n": SIZE, **_DTYPE}, _eye),
    _operator("eye_of", _aten.eye.m, {"n": SIZE, "m": SIZE, **_DTYPE}, _eye),
    _operator("arange", _aten.arange.default, _RANGE_END, _arange),
    _operator("arange_from", _aten.arange.start, {"start": SIZE, **_RANGE_END}, _arange),
    _operator(
        "arange_step",
        _aten.arange.start_step,
        {"start": SIZE, "end": SIZE, "step": _STEP, **_DTYPE},
        _arange,
    ),
    _operator("size", _aten.sym_size.int, {"self": TENSOR, "dim": DIM}, _size_of),
    _operator("size_sum", operator.add, _SIZES, _on_sizes(operator.add)),
    _operator("size_difference", operator.sub, _SIZES, _on_sizes(operator.sub)),
    _operator("size_product", operator.mul, _SIZES, _on_sizes(operator.mul)),
    _operator("size_quotient", operator.floordiv, _SIZES, _on_sizes(floored)),
    _operator("size_remainder", operator.mod, _SIZES, _on_sizes(remainder)),
]
