"""Operators of arithmetic, comparison and logic: element by element, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import (
    DTYPE,
    FLOAT,
    LAYOUT,
    NUMBER,
    TENSOR,
    Kind,
    choice,
    optional,
)
from biper_engine.graph.operator import Numbers, Operator, Rule, passing
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

_OPERANDS = {"self": TENSOR, "other": TENSOR}
_WITH_NUMBER = {"self": TENSOR, "other": NUMBER}
_WITH_EITHER = {
    "self": TENSOR,
    "other": Kind("a tensor or a number", lambda v: TENSOR.accepts(v) or NUMBER.accepts(v), True),
}


def _operator(name: str, target: Any, arguments: Mapping[str, Kind], result: Rule) -> Operator:
    return Operator(
        name=name, target=target, arguments=arguments, result=result, rows=rows.elementwise
    )


# -- functions of one operand ----------------------------------------------------------------------


def _same(dtypes: Sequence[torch.dtype]) -> Rule:
    """Return the rule of a result like its operand, whose dtype must be one of some."""

    def rule(self: Value, **options: Any) -> Value:
        require_dtype("self", self, dtypes)
        return self.like(*self.shape)

    return rule


def _to_bool(dtypes: Sequence[torch.dtype]) -> Rule:
    def rule(self: Value) -> Value:
        require_dtype("self", self, dtypes)
        return self.like(*self.shape, dtype=torch.bool)

    return rule


_FLOAT_FUNCTIONS = "reciprocal sqrt exp sin cos tanh erf sigmoid"
_OTHER_FUNCTIONS = (
    "rsqrt exp2 expm1 log log1p log2 log10 tan asin acos atan sinh cosh asinh acosh atanh erfc "
    "sinc frac lgamma digamma"
)
_NUMBER_FUNCTIONS = "abs neg sign sgn round floor ceil trunc"


def _functions(names: str, dtypes: Sequence[torch.dtype]) -> list[Operator]:
    return [
        _operator(name, getattr(_aten, name).default, {"self": TENSOR}, _same(dtypes))
        for name in names.split()
    ]


# -- two operands ----------------------------------------------------------------------------------


def _operand_dtypes(dtypes: Sequence[torch.dtype], *operands: Any) -> None:
    for name, operand in zip(("self", "other", "third"), operands, strict=False):
        if isinstance(operand, Value):
            require_dtype(name, operand, dtypes)


def _shape(*operands: Any) -> tuple[Any, ...]:
    return broadcast(*[x.shape for x in operands if isinstance(x, Value)])


def _arithmetic(
    dtypes: Sequence[torch.dtype], dtype_of: Callable[..., torch.dtype] = promoted
) -> Rule:
    def rule(self: Value, other: Any, alpha: Any = 1, **options: Any) -> Value:
        _operand_dtypes(dtypes, self, other)
        dtype = dtype_of(self, other)
        fits = isinstance(alpha, int) or dtype.is_floating_point
        require(fits and not isinstance(alpha, bool), f"`alpha` (={alpha}) for {dtype}")
        return Value(dtype, _shape(self, other))

    return rule


def _compared(self: Value, other: Any) -> Value:
    _operand_dtypes(ANY, self, other)
    return Value(torch.bool, _shape(self, other), limits=(0, 1))


def _logical(self: Value, other: Value) -> Value:
    return _compared(self, other)


def _bitwise(self: Value, other: Any) -> Value:
    _operand_dtypes((*BOOLS, *INTEGERS), self, other)
    require(not isinstance(other, float), f"`other` (={other}) must be an integer")
    return Value(promoted(self, other), _shape(self, other))


def _power(self: Value, exponent: Any) -> Value:
    _operand_dtypes(FLOATS, self, exponent)
    return Value(promoted(self, exponent), _shape(self, exponent))


def _number_power(self: Any, exponent: Value) -> Value:
    require_dtype("exponent", exponent, FLOATS)
    return Value(promoted(self, exponent), exponent.shape)


def _of_floats(self: Value, other: Any, **options: Any) -> Value:
    _operand_dtypes(FLOATS, self, other)
    return Value(promoted(self, other), _shape(self, other))


def _heaviside(self: Value, values: Value) -> Value:
    return Value(same_dtype(NUMBERS, self=self, values=values), _shape(self, values))


def _remainder(self: Value, other: Any) -> Value:
    require_dtype("self", self, NUMBERS)
    integers = not promoted(self, other).is_floating_point
    require(not integers or (type(other) is int and other != 0), f"division by {other}")
    return Value(promoted(self, other), self.shape)


def _two_forms(
    name: str, packet: Any, tensors: Rule, numbers: Rule | None = None, **more: Kind
) -> list[Operator]:
    """Return an operator on two tensors, and `name_number` on a tensor and a number."""
    # Only these four take a number in place of a tensor in PyTorch.
    operands = _WITH_EITHER if name in ("add", "sub", "mul", "div") else _OPERANDS
    return [
        _operator(name, packet.Tensor, {**operands, **more}, tensors),
        _operator(f"{name}_number", packet.Scalar, {**_WITH_NUMBER, **more}, numbers or tensors),
    ]


_COMPARISONS = {"greater_equal": "ge", "greater": "gt", "less_equal": "le", "less": "lt"} | {
    "equal": "eq",
    "not_equal": "ne",
}


def _comparisons() -> list[Operator]:
    found = []
    for name, aten_name in _COMPARISONS.items():
        packet = getattr(_aten, aten_name)
        found.append(_operator(name, packet.Scalar, _WITH_NUMBER, _compared))
        found.append(_operator(f"{name}_tensor", packet.Tensor, _OPERANDS, _compared))
    return found


# -- three operands --------------------------------------------------------------------------------


def _where(condition: Value, self: Value, other: Value) -> Value:
    require_dtype("condition", condition, BOOLS)
    _operand_dtypes(ANY, self, other)
    return Value(promoted(self, other), _shape(condition, self, other))


def _masked_fill(self: Value, mask: Value, value: Any) -> Value:
    require_dtype("self", self, ANY)
    require_dtype("mask", mask, BOOLS)
    if isinstance(value, Value):
        require_dtype("value", value, ANY)
        require(not value.shape, f"`value` (={value}) must have no dimensions")
    dtype = promoted(self, value)
    fits = self.rank > 0 and dtype == self.dtype and broadcast(self.shape, mask.shape)
    require(fits == self.shape, f"`self` is {self}, `mask` is {mask}, `value` is {value}")
    _require_range(self.dtype, value)
    return self.like(*self.shape)


def _require_range(dtype: torch.dtype, *numbers: Any) -> None:
    """Require numbers that an integer dtype can hold."""
    if dtype.is_floating_point or dtype == torch.bool:
        return
    limits = torch.iinfo(dtype)
    for value in numbers:
        fits = not isinstance(value, int | float) or limits.min <= value <= limits.max
        require(fits, f"{value} does not fit {dtype}")


def _scaled_sum(self: Value, tensor1: Value, tensor2: Value, value: Any) -> Value:
    _operand_dtypes(FLOATS, self, tensor1, tensor2)
    return Value(promoted(self, tensor1, tensor2), _shape(self, tensor1, tensor2))


def _lerp(self: Value, end: Value, weight: Any) -> Value:
    same_dtype(FLOATS, self=self, end=end)
    if isinstance(weight, Value):
        same_dtype(FLOATS, self=self, weight=weight)
    return Value(self.dtype, _shape(self, end, weight))


# -- limits ----------------------------------------------------------------------------------------


def _clamp(self: Value, min: Any, max: Any) -> Value:
    require(min is not None or max is not None, "`min` or `max` must be given")
    require_dtype("self", self, NUMBERS)
    _require_range(self.dtype, min, max)
    return Value(promoted(self, *(x for x in (min, max) if x is not None)), self.shape)


def _clamp_tensors(self: Value, min: Value | None, max: Value | None) -> Value:
    given = [x for x in (min, max) if x is not None]
    require(bool(given), "`min` or `max` must be given")
    _operand_dtypes(FLOATS, self, *given)
    return Value(promoted(self, *given), _shape(self, *given))


def _clamp_one(self: Value, **limit: Any) -> Value:
    (value,) = limit.values()
    require_dtype("self", self, FLOATS)
    if isinstance(value, Value):
        require_dtype("limit", value, FLOATS)
    return Value(promoted(self, value), _shape(self, value))


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
    *_functions(_FLOAT_FUNCTIONS, FLOATS),
    *_functions(_NUMBER_FUNCTIONS, NUMBERS),
    _operator("logical_not", _aten.logical_not.default, {"self": TENSOR}, _to_bool(ANY)),
    _operator(
        "bitwise_not", _aten.bitwise_not.default, {"self": TENSOR}, _same((*BOOLS, *INTEGERS))
    ),
    _operator("is_nan", _aten.isnan.default, {"self": TENSOR}, _to_bool(FLOATS)),
    *_two_forms("add", _aten.add, _arithmetic(ANY), alpha=NUMBER),
    *_two_forms("sub", _aten.sub, _arithmetic(NUMBERS), alpha=NUMBER),
    *_two_forms("mul", _aten.mul, _arithmetic(ANY)),
    *_two_forms("div", _aten.div, _arithmetic(ANY, computing_dtype)),
    *_two_forms("remainder", _aten.remainder, _of_floats, _remainder),
    _operator(
        "div_rounded",
        _aten.div.Tensor_mode,
        {**_WITH_EITHER, "rounding_mode": optional(_ROUNDING)},
        _of_floats,
    ),
    _operator("reversed_sub", _aten.rsub.Scalar, {**_WITH_NUMBER, "alpha": NUMBER}, _of_floats),
    _operator("maximum", _aten.maximum.default, _OPERANDS, _arithmetic(ANY)),
    _operator("minimum", _aten.minimum.default, _OPERANDS, _arithmetic(ANY)),
    _operator("copysign", _aten.copysign.Tensor, _OPERANDS, _of_floats),
    _operator("heaviside", _aten.heaviside.default, {"self": TENSOR, "values": TENSOR}, _heaviside),
    _operator("power", _aten.pow.Tensor_Scalar, {"self": TENSOR, "exponent": NUMBER}, _power),
    _operator(
        "power_tensor", _aten.pow.Tensor_Tensor, {"self": TENSOR, "exponent": TENSOR}, _power
    ),
    _operator(
        "number_power", _aten.pow.Scalar, {"self": NUMBER, "exponent": TENSOR}, _number_power
    ),
    *_comparisons(),
    *[
        _operator(f"logical_{name}", getattr(_aten, f"logical_{name}").default, _OPERANDS, _logical)
        for name in ("and", "or", "xor")
    ],
    *[
        operator
        for name in ("and", "or", "xor")
        for operator in _two_forms(f"bitwise_{name}", getattr(_aten, f"bitwise_{name}"), _bitwise)
    ],
    _operator(
        "where", _aten.where.self, {"condition": TENSOR, "self": TENSOR, "other": TENSOR}, _where
    ),
    _operator(
        "masked_fill",
        _aten.masked_fill.Scalar,
        {"self": TENSOR, "mask": TENSOR, "value": NUMBER},
        _masked_fill,
    ),
    _operator(
        "masked_fill_tensor",
        _aten.masked_fill.Tensor,
        {"self": TENSOR, "mask": TENSOR, "value": TENSOR},
        _masked_fill,
    ),
    _operator(
        "clamp",
        _aten.clamp.default,
        {"self": TENSOR, "min": optional(NUMBER), "max": optional(NUMBER)},
        _clamp,
    ),
    _operator(
        "clamp_tensor",
        _aten.clamp.Tensor,
        {"self": TENSOR, "min": optional(TENSOR), "max": optional(TENSOR)},
        _clamp_tensors,
    ),
    _operator("clamp_min", _aten.clamp_min.default, {"self": TENSOR, "min": NUMBER}, _clamp_one),
    _operator("clamp_max", _aten.clamp_max.default, {"self": TENSOR, "max": NUMBER}, _clamp_one),
    _operator(
        "clamp_min_tensor", _aten.clamp_min.Tensor, {"self": TENSOR, "min": TENSOR}, _clamp_one
    ),
    _operator(
        "clamp_max_tensor", _aten.clamp_max.Tensor, {"self": TENSOR, "max": TENSOR}, _clamp_one
    ),
    _operator(
        "hardtanh",
        _aten.hardtanh.default,
        {"self": TENSOR, "min_val": NUMBER, "max_val": NUMBER},
        _hardtanh,
    ),
    _operator(
        "to_dtype",
        _aten._to_copy.default,
        {"self": TENSOR, "dtype": optional(DTYPE), "memory_format": LAYOUT},
        _to_dtype,
    ),
]

OPERATORS: list[Operator] = [
    *passing(Numbers.ELEMENTWISE, _ELEMENTWISE),
    *_functions(_OTHER_FUNCTIONS, FLOATS),
    _operator("is_inf", _aten.isinf.default, {"self": TENSOR}, _to_bool(FLOATS)),
    _operator(
        "nan_to_num",
        _aten.nan_to_num.default,
        {"self": TENSOR, **dict.fromkeys(("nan", "posinf", "neginf"), optional(FLOAT))},
        _same(FLOATS),
    ),
    _operator(
        "logit", _aten.logit.default, {"self": TENSOR, "eps": optional(FLOAT)}, _same(FLOATS)
    ),
    *_two_forms("fmod", _aten.fmod, _of_floats, _remainder),
    _operator("floor_divide", _aten.floor_divide.default, _WITH_EITHER, _of_floats),
    _operator("atan2", _aten.atan2.default, _OPERANDS, _of_floats),
    _operator("hypot", _aten.hypot.default, _OPERANDS, _of_floats),
    *[
        _operator(
            name,
            getattr(_aten, name).default,
            {"self": TENSOR, "tensor1": TENSOR, "tensor2": TENSOR, "value": FLOAT},
            _scaled_sum,
        )
        for name in ("addcmul", "addcdiv")
    ],
    _operator("lerp", _aten.lerp.Tensor, {"self": TENSOR, "end": TENSOR, "weight": TENSOR}, _lerp),
    _operator(
        "lerp_number", _aten.lerp.Scalar, {"self": TENSOR, "end": TENSOR, "weight": FLOAT}, _lerp
    ),
    _operator("clone", _aten.clone.default, {"self": TENSOR, "memory_format": LAYOUT}, _clone),
]
