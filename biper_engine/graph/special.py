"""Special functions, extremes that ignore NaN, and losses: element by element."""

from __future__ import annotations

from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import FLOAT, NUMBER, TENSOR, integer, number, optional
from biper_engine.graph.elementwise import (
    OPERANDS,
    arithmetic,
    elementwise,
    functions,
    joint_shape,
    of_floats,
    same,
    to_bool,
)
from biper_engine.graph.operator import Numbers, Operator, passing
from biper_engine.graph.values import ANY, FLOATS, NUMBERS, Value, require, same_dtype

__all__ = ["OPERATORS"]

_aten = torch.ops.aten

_FUNCTIONS = (
    "rsqrt exp2 expm1 log log1p log2 log10 tan asin acos atan sinh cosh asinh acosh atanh erfc "
    "erfinv sinc frac lgamma digamma deg2rad rad2deg i0 special_entr"
)
_WIDE = (torch.float32, torch.float64)


def _two(name: str, target: Any = None) -> Operator:
    return elementwise(name, target or getattr(_aten, name).default, OPERANDS, of_floats)


def _same_pair(self: Value, other: Value) -> Value:
    dtype = same_dtype(FLOATS, self=self, other=other)
    return Value(dtype, joint_shape(self, other))


def _polygamma(n: int, self: Value) -> Value:
    found = same(_WIDE)(self=self)
    assert isinstance(found, Value)
    return found


# -- losses ----------------------------------------------------------------------------------------

_NONE, _MEAN, _SUM = 0, 1, 2


def _loss(self: Value, target: Value, reduction: int, **options: Any) -> Value:
    same_dtype(FLOATS, self=self, target=target)
    shape = joint_shape(self, target)
    require(shape in (self.shape, target.shape), f"`self` is {self}, `target` {target}")
    return self.like(*(shape if reduction == _NONE else ()))


def _loss_rows(named: Any, result: Any) -> bool:
    return named["reduction"] == _NONE and rows.elementwise(named, result)


def _losses() -> list[Operator]:
    return [
        Operator(
            name=name,
            target=getattr(_aten, name).default,
            arguments={**dict.fromkeys(("self", "target"), TENSOR), "reduction": _REDUCTION} | more,
            result=_loss,
            rows=_loss_rows,
        )
        for name, more in (
            ("mse_loss", {}),
            ("smooth_l1_loss", {"beta": number(0)}),
            ("huber_loss", {"delta": number(1e-9)}),
        )
    ]


_REDUCTION = integer(_NONE, _SUM)

_SIGN_BIT = elementwise("signbit", _aten.signbit.default, {"self": TENSOR}, to_bool(ANY))

OPERATORS: list[Operator] = [
    *passing(Numbers.ELEMENTWISE, [_SIGN_BIT]),
    *functions(_FUNCTIONS, FLOATS),
    *functions("special_log_ndtr", _WIDE),
    elementwise(
        "logit", _aten.logit.default, {"self": TENSOR, "eps": optional(FLOAT)}, same(FLOATS)
    ),
    elementwise(
        "round_decimals",
        _aten.round.decimals,
        {"self": TENSOR, "decimals": integer(-300, 300)},
        same(FLOATS),
    ),
    elementwise(
        "polygamma", _aten.polygamma.default, {"n": integer(0, 64), "self": TENSOR}, _polygamma
    ),
    *[
        elementwise(f"is_{sign}_inf", getattr(_aten, name).default, {"self": TENSOR}, to_bool(ANY))
        for sign, name in (("positive", "isposinf"), ("negative", "isneginf"))
    ],
    *map(_two, ("atan2", "hypot", "logaddexp", "logaddexp2")),
    _two("xlogy", _aten.xlogy.Tensor),
    elementwise("fmax", _aten.fmax.default, OPERANDS, arithmetic(NUMBERS)),
    elementwise("fmin", _aten.fmin.default, OPERANDS, arithmetic(NUMBERS)),
    elementwise("nextafter", _aten.nextafter.default, OPERANDS, _same_pair),
    elementwise("ldexp", _aten.ldexp.Tensor, OPERANDS, _same_pair),
    elementwise(
        "reversed_sub_tensor",
        _aten.rsub.Tensor,
        {**OPERANDS, "alpha": NUMBER},
        arithmetic(NUMBERS),
    ),
    *_losses(),
]
