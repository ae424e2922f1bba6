"""Operators of arithmetic, comparison and logic: element by element, with broadcasting."""

from __future__ import annotations

from typing import Any

import torch

from biper_engine.graph.arguments import DTYPE, FLOAT, LAYOUT, NUMBER, TENSOR, choice, optional
from biper_engine.graph.elementwise import (
    OPERANDS,
    WITH_EITHER,
    WITH_NUMBER,
    arithmetic,
    bitwise,
    compared,
    elementwise,
    functions,
    joint_shape,
    of_floats,
    of_numbers,
    remainder,
    require_operands,
    require_range,
    same,
    to_bool,
    two_forms,
)
from biper_engine.graph.operator import Numbers, Operator, passing
from biper_engine.graph.values import (
    ANY,
    BOOLS,
    FLOATS,
    INTEGERS,
    NUMBERS,
    Value,
    broadcast,
    computing_dtype,
    promoted,
    require,
    require_dtype,
    same_dtype,
)

__all__ = ["OPERATORS"]

_aten = torch.ops.aten

_FLOAT_FUNCTIONS = "reciprocal sqrt exp sin cos tanh erf sigmoid"
_NUMBER_FUNCTIONS = "abs neg sign sgn round floor ceil trunc"


# -- two operands ----------------------------------------------------------------------------------


def _logical(self: Value, other: Value) -> Value:
    return compared(self, other)


def _rounded_quotient(self: Value, other: Any, rounding_mode: str | None) -> Value:
    rule = of_floats if rounding_mode is None else of_numbers
    found = rule(self, other)
    assert isinstance(found, Value)
    return found


def _power(self: Value, exponent: Any) -> Value:
    integers = type(exponent) is int and 0 <= exponent < 64
    require_operands(NUMBERS if integers else FLOATS, self, exponent)
    return Value(promoted(self, exponent), joint_shape(self, exponent))


def _number_power(self: Any, exponent: Value) -> Value:
    require_dtype("exponent", exponent, FLOATS)
    return Value(promoted(self, exponent), exponent.shape)


def _heaviside(self: Value, values: Value) -> Value:
    return Value(same_dtype(NUMBERS, self=self, values=values), joint_shape(self, values))


def _shifted(self: Value, other: Any) -> Value:
    require_dtype("self", self, INTEGERS)
    bits = torch.iinfo(self.dtype).bits
    require(type(other) is int and 0 <= other < bits, f"`other` (={other}) for {self}")
    return self.like(*self.shape)


_COMPARISONS = {"greater_equal": "ge", "greater": "gt", "less_equal": "le", "less": "lt"} | {
    "equal": "eq",
    "not_equal": "ne",
}


def _comparisons() -> list[Operator]:
    found = []
    for name, aten_name in _COMPARISONS.items():
        packet = getattr(_aten, aten_name)
        found.append(elementwise(name, packet.Scalar, WITH_NUMBER, compared))
        found.append(elementwise(f"{name}_tensor", packet.Tensor, OPERANDS, compared))
    return found


# -- three operands --------------------------------------------------------------------------------


def _where(condition: Value, self: Value, other: Value) -> Value:
    require_dtype("condition", condition, BOOLS)
    require_operands(ANY, self, other)
    return Value(promoted(self, other), joint_shape(condition, self, other))


def _masked_fill(self: Value, mask: Value, value: Any) -> Value:
    require_dtype("self", self, ANY)
    require_dtype("mask", mask, BOOLS)
    if isinstance(value, Value):
        require_dtype("value", value, ANY)
        require(not value.shape, f"`value` (={value}) must have no dimensions")
    dtype = promoted(self, value)
    fits = self.rank > 0 and dtype == self.dtype and broadcast(self.shape, mask.shape)
    require(fits == self.shape, f"`self` is {self}, `mask` is {mask}, `value` is {value}")
    require_range(self.dtype, value)
    return self.like(*self.shape)


def _scaled_sum(self: Value, tensor1: Value, tensor2: Value, value: Any) -> Value:
    require_operands(FLOATS, self, tensor1, tensor2)
    return Value(promoted(self, tensor1, tensor2), joint_shape(self, tensor1, tensor2))


def _lerp(self: Value, end: Value, weight: Any) -> Value:
    same_dtype(FLOATS, self=self, end=end)
    if isinstance(weight, Value):
        same_dtype(FLOATS, self=self, weight=weight)
    return Value(self.dtype, joint_shape(self, end, weight))


# -- limits ----------------------------------------------------------------------------------------


def _clamp(self: Value, min: Any, max: Any) -> Value:
    require(min is not None or max is not None, "`min` or `max` must be given")
    require_dtype("self", self, NUMBERS)
    require_range(self.dtype, min, max)
    return Value(promoted(self, *(x for x in (min, max) if x is not None)), self.shape)


def _clamp_tensors(self: Value, min: Value | None, max: Value | None) -> Value:
    given = [x for x in (min, max) if x is not None]
    require(bool(given), "`min` or `max` must be given")
    require_operands(FLOATS, self, *given)
    return Value(promoted(self, *given), joint_shape(self, *given))


def _clamp_one(self: Value, **limit: Any) -> Value:
    (value,) = limit.values()
    require_dtype("self", self, FLOATS)
    if isinstance(value, Value):
        require_dtype("limit", value, FLOATS)
    return Value(promoted(self, value), joint_shape(self, value))


def _hardtanh(self: Value, min_val: Any, max_val: Any) -> Value:
    require_dtype("self", self, FLOATS)
    return self.like(*self.shape)


# -- dtypes ----------------------------------------------------------------------------------------


def _to_dtype(self: Value, dtype: torch.dtype | None, **options: Any) -> Value:
    require_dtype("self", self, ANY)
    wanted = dtype or self.dtype
    is_wider = not wanted.is_floating_point and self.limits is not None
    limits = self.limits if is_wider and wanted in (torch.int32, torch.int64) else None
    return Value(wanted, self.shape, limits=limits)


def _clone(self: Value, memory_format: Any) -> Value:
    require(
        memory_format != torch.channels_last or self.rank == 4,
        f"channels_last needs 4 dimensions, but `self` is {self}",
    )
    dense = self.dense or memory_format == torch.contiguous_format
    return Value(self.dtype, self.shape, self.channels, limits=self.limits, dense=dense)


_ROUNDING = choice("floor", "trunc")

_ELEMENTWISE = [
    *functions(_FLOAT_FUNCTIONS, FLOATS),
    *functions(_NUMBER_FUNCTIONS, NUMBERS),
    elementwise("logical_not", _aten.logical_not.default, {"self": TENSOR}, to_bool(ANY)),
    elementwise(
        "bitwise_not", _aten.bitwise_not.default, {"self": TENSOR}, same((*BOOLS, *INTEGERS))
    ),
    elementwise("is_nan", _aten.isnan.default, {"self": TENSOR}, to_bool(FLOATS)),
    *two_forms("add", _aten.add, arithmetic(ANY), alpha=NUMBER),
    *two_forms("sub", _aten.sub, arithmetic(NUMBERS), alpha=NUMBER),
    *two_forms("mul", _aten.mul, arithmetic(ANY)),
    *two_forms("div", _aten.div, arithmetic(ANY, computing_dtype)),
    *two_forms("remainder", _aten.remainder, of_floats, remainder),
    elementwise(
        "div_rounded",
        _aten.div.Tensor_mode,
        {**WITH_EITHER, "rounding_mode": optional(_ROUNDING)},
        _rounded_quotient,
    ),
    elementwise("reversed_sub", _aten.rsub.Scalar, {**WITH_NUMBER, "alpha": NUMBER}, of_floats),
    elementwise("maximum", _aten.maximum.default, OPERANDS, arithmetic(ANY)),
    elementwise("minimum", _aten.minimum.default, OPERANDS, arithmetic(ANY)),
    elementwise("copysign", _aten.copysign.Tensor, OPERANDS, of_floats),
    elementwise(
        "heaviside", _aten.heaviside.default, {"self": TENSOR, "values": TENSOR}, _heaviside
    ),
    elementwise("power", _aten.pow.Tensor_Scalar, {"self": TENSOR, "exponent": NUMBER}, _power),
    elementwise(
        "power_tensor", _aten.pow.Tensor_Tensor, {"self": TENSOR, "exponent": TENSOR}, _power
    ),
    elementwise(
        "number_power", _aten.pow.Scalar, {"self": NUMBER, "exponent": TENSOR}, _number_power
    ),
    *_comparisons(),
    *[
        elementwise(
            f"logical_{name}", getattr(_aten, f"logical_{name}").default, OPERANDS, _logical
        )
        for name in ("and", "or", "xor")
    ],
    *[
        operator
        for name in ("and", "or", "xor")
        for operator in two_forms(f"bitwise_{name}", getattr(_aten, f"bitwise_{name}"), bitwise)
    ],
    *[
        elementwise(f"shift_{to}_number", target, WITH_NUMBER, _shifted, other)
        for to, target, other in (
            ("left", _aten.bitwise_left_shift.Tensor_Scalar, _aten.__lshift__.Scalar),
            ("right", _aten.bitwise_right_shift.Tensor_Scalar, _aten.__rshift__.Scalar),
        )
    ],
    elementwise(
        "where", _aten.where.self, {"condition": TENSOR, "self": TENSOR, "other": TENSOR}, _where
    ),
    elementwise(
        "masked_fill",
        _aten.masked_fill.Scalar,
        {"self": TENSOR, "mask": TENSOR, "value": NUMBER},
        _masked_fill,
    ),
    elementwise(
        "masked_fill_tensor",
        _aten.masked_fill.Tensor,
        {"self": TENSOR, "mask": TENSOR, "value": TENSOR},
        _masked_fill,
    ),
    elementwise(
        "clamp",
        _aten.clamp.default,
        {"self": TENSOR, "min": optional(NUMBER), "max": optional(NUMBER)},
        _clamp,
    ),
    elementwise(
        "clamp_tensor",
        _aten.clamp.Tensor,
        {"self": TENSOR, "min": optional(TENSOR), "max": optional(TENSOR)},
        _clamp_tensors,
    ),
    elementwise("clamp_min", _aten.clamp_min.default, {"self": TENSOR, "min": NUMBER}, _clamp_one),
    elementwise("clamp_max", _aten.clamp_max.default, {"self": TENSOR, "max": NUMBER}, _clamp_one),
    elementwise(
        "clamp_min_tensor", _aten.clamp_min.Tensor, {"self": TENSOR, "min": TENSOR}, _clamp_one
    ),
    elementwise(
        "clamp_max_tensor", _aten.clamp_max.Tensor, {"self": TENSOR, "max": TENSOR}, _clamp_one
    ),
    elementwise(
        "hardtanh",
        _aten.hardtanh.default,
        {"self": TENSOR, "min_val": NUMBER, "max_val": NUMBER},
        _hardtanh,
    ),
    elementwise(
        "to_dtype",
        _aten._to_copy.default,
        {"self": TENSOR, "dtype": optional(DTYPE), "memory_format": LAYOUT},
        _to_dtype,
    ),
]

OPERATORS: list[Operator] = [
    *passing(Numbers.ELEMENTWISE, _ELEMENTWISE),
    elementwise("is_inf", _aten.isinf.default, {"self": TENSOR}, to_bool(FLOATS)),
    elementwise(
        "nan_to_num",
        _aten.nan_to_num.default,
        {"self": TENSOR, **dict.fromkeys(("nan", "posinf", "neginf"), optional(FLOAT))},
        same(FLOATS),
    ),
    *two_forms("fmod", _aten.fmod, of_floats, remainder),
    elementwise("floor_divide", _aten.floor_divide.default, WITH_EITHER, of_numbers),
    *[
        elementwise(
            name,
            getattr(_aten, name).default,
            {"self": TENSOR, "tensor1": TENSOR, "tensor2": TENSOR, "value": FLOAT},
            _scaled_sum,
        )
        for name in ("addcmul", "addcdiv")
    ],
    elementwise(
        "lerp", _aten.lerp.Tensor, {"self": TENSOR, "end": TENSOR, "weight": TENSOR}, _lerp
    ),
    elementwise(
        "lerp_number", _aten.lerp.Scalar, {"self": TENSOR, "end": TENSOR, "weight": FLOAT}, _lerp
    ),
    elementwise("clone", _aten.clone.default, {"self": TENSOR, "memory_format": LAYOUT}, _clone),
]
