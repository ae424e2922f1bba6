"""Activations: functions of one float map, with parameters."""

from __future__ import annotations

from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import DIM, FALSE, FLOAT, NONE, NUMBER, TENSOR, Kind, choice
from biper_engine.graph.operator import Numbers, Operator, passing
from biper_engine.graph.sizes import divided
from biper_engine.graph.values import (
    FLOATS,
    Value,
    axis,
    broadcast,
    require,
    require_dtype,
    same_dtype,
)

__all__ = ["OPERATORS"]

_aten = torch.ops.aten


def _same(self: Value, **options: Any) -> Value:
    require_dtype("self", self, FLOATS)
    return self.like(*self.shape)


def _activation(name: str, target: Any = None, **options: Kind) -> Operator:
    return Operator(
        name=name,
        target=target or getattr(_aten, name).default,
        arguments={"self": TENSOR, **options},
        result=_same,
        rows=rows.elementwise,
    )


def _prelu(self: Value, weight: Value) -> Value:
    dtype = same_dtype(FLOATS, self=self, weight=weight)
    require(
        broadcast(self.shape, weight.shape) == self.shape,
        f"`weight` (={weight}) cannot be broadcast to `self` (={self})",
    )
    return self.like(*self.shape, dtype=dtype)


def _glu(self: Value, dim: int) -> Value:
    require_dtype("self", self, FLOATS)
    at = axis(dim, self.rank)
    half = divided(self.shape[at], 2)
    return self.like(*self.shape[:at], half, *self.shape[at + 1 :])


def _softmax(self: Value, dim: int, half_to_float: bool) -> Value:
    require_dtype("self", self, FLOATS)
    axis(dim, self.rank)
    return self.like(*self.shape)


def _safe_softmax(self: Value, dim: int, dtype: Any) -> Value:
    return _softmax(self, dim, False)


def _log_sigmoid(self: Value) -> tuple[Value, ...]:
    require_dtype("self", self, FLOATS)
    return (self.like(*self.shape),)  # the second result is only for gradients


_SOFTMAX = {"self": TENSOR, "dim": DIM, "half_to_float": FALSE}

_ELEMENTWISE = [
    *map(_activation, ("relu", "silu", "hardswish", "hardsigmoid")),
    _activation("leaky_relu", negative_slope=FLOAT),
    _activation("elu", alpha=FLOAT, scale=FLOAT, input_scale=FLOAT),
    _activation("gelu", approximate=choice("none", "tanh")),
    _activation("softplus", beta=FLOAT, threshold=FLOAT),
    _activation("threshold", threshold=NUMBER, value=NUMBER),
    Operator(
        name="prelu",
        target=_aten._prelu_kernel.default,
        arguments={"self": TENSOR, "weight": TENSOR},
        result=_prelu,
        rows=rows.elementwise,
    ),
]

OPERATORS: list[Operator] = [
    *passing(Numbers.ELEMENTWISE, _ELEMENTWISE),
    _activation("mish"),
    _activation("celu", alpha=FLOAT),
    Operator(
        name="glu",
        target=_aten.glu.default,
        arguments={"self": TENSOR, "dim": DIM},
        result=_glu,
        rows=rows.over_dims,
    ),
    Operator(
        name="log_sigmoid",
        target=_aten.log_sigmoid_forward.default,
        arguments={"self": TENSOR},
        result=_log_sigmoid,
        rows=rows.first_flows,
    ),
    Operator(
        name="softmax",
        target=_aten._softmax.default,
        arguments=_SOFTMAX,
        result=_softmax,
        rows=rows.over_dims,
    ),
    Operator(
        name="safe_softmax",
        target=_aten._safe_softmax.default,
        arguments={"self": TENSOR, "dim": DIM, "dtype": NONE},
        result=_safe_softmax,
        rows=rows.over_dims,
    ),
    Operator(
        name="log_softmax",
        target=_aten._log_softmax.default,
        arguments=_SOFTMAX,
        result=_softmax,
        rows=rows.over_dims,
    ),
]
