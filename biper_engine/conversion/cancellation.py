"""How much rounding may change a sum, which can be far smaller than the terms that it is made of.

A sum of n terms in float32 is wrong by up to n * 2^-24 * sum |terms|, in one order as in another,
and in practice by the root of n: its roundings have both signs. Where terms cancel, that is far
more than 2^-24 of the sum. The terms are those of the model's own operators, between the values
that a segment of the engine reads and the one that it makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from biper_engine.conversion.verify_report import ROUNDING

__all__ = ["Cancellation"]

_aten: Any = torch.ops.aten
_HALF_STEPS = 4  # roundings of inputs, weights, bias and result; sums are in float32

# Results whose elements are elements of an input, or 0.
_MOVES = frozenset(
    (
        *(_aten.reshape, _aten.view, _aten.flatten, _aten.permute, _aten.transpose, _aten.t),
        *(_aten.unsqueeze, _aten.squeeze, _aten.expand, _aten.slice, _aten.select, _aten.cat),
        *(_aten.clone, _aten.contiguous, _aten.alias),
    )
)
# Results that differ by no more than their input does.
_LIMITS = frozenset((_aten.relu, _aten.hardtanh, _aten.clamp))
_PRODUCTS = frozenset(
    (
        *(_aten.conv1d, _aten.conv2d, _aten.conv3d, _aten.linear),
        *(_aten.mm, _aten.bmm, _aten.matmul, _aten.addmm, _aten.baddbmm),
    )
)
_WITH_WEIGHT = frozenset((_aten.conv1d, _aten.conv2d, _aten.conv3d, _aten.linear))
_SUMS = frozenset((_aten.sum, _aten.mean, _aten.adaptive_avg_pool2d))


class _Terms(NamedTuple):
    """Sums of magnitudes of terms, and how many roundings the longest of them has."""

    magnitude: Tensor
    roundings: int


class _BeyondError(Exception):
    """A value that the segment does not read."""


class Cancellation:
    """Bounds of rounding, from the terms of a model's sums.

    Args:
        float_graph: the model's operators.
        values: the model's values by the `source` of their nodes.
    """

    def __init__(self, float_graph: fx.GraphModule, values: Mapping[str, Any]) -> None:
        self._module = float_graph
        self._values = values
        self._nodes = {_source(node): node for node in float_graph.graph.nodes}

    def bound(self, source: str, inputs: Collection[str], dtype: torch.dtype) -> Tensor | None:
        """Return how much rounding may change each element of a value.

        Args:
            source: the value.
            inputs: values that are given exactly.
            dtype: that the value, the inputs and the constants are rounded to.

        Returns:
            A tensor of the value's shape, or None if it is not made of the inputs by sums,
            products with constants, and what only moves or limits values.
        """
        node = self._nodes.get(source)
        if node is None or source in inputs:
            return None
        try:
            terms = self._terms(node, frozenset(inputs), {})
        except _BeyondError:
            return None
        if terms is None or terms.roundings == 0:
            return None
        steps = 2 * math.sqrt(terms.roundings)  # of the model's sum, and of the engine's
        unit = ROUNDING[torch.float32] * steps
        if dtype in ROUNDING and dtype != torch.float32:
            unit += ROUNDING[dtype] * _HALF_STEPS
        return unit * terms.magnitude

    def _terms(
        self, node: fx.Node, inputs: frozenset[str], known: dict[fx.Node, _Terms]
    ) -> _Terms | None:
        """Return the terms of a node's value; None if the node is no sum of its inputs' terms."""
        if node not in known:
            if node.op == "placeholder" and _source(node) not in inputs:
                raise _BeyondError
            found = None
            if node.op == "call_function" and _source(node) not in inputs:
                found = self._of_call(node, lambda other: self._inner(other, inputs, known))
            if found is None:
                return None
            known[node] = found
        return known[node]

    def _inner(self, node: fx.Node, inputs: frozenset[str], known: dict[fx.Node, _Terms]) -> _Terms:
        terms = self._terms(node, inputs, known)
        return _Terms(self._value(node).abs(), 0) if terms is None else terms

    def _value(self, node: fx.Node) -> Tensor:
        if node.op == "get_attr":
            value: Any = self._module
            for name in str(node.target).split("."):
                value = getattr(value, name)
        else:
            value = self._values[_source(node)]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise _BeyondError
        return value

    def _of_call(self, node: fx.Node, terms_of: Callable[[fx.Node], _Terms]) -> _Terms | None:
        """Return the terms of a call; `terms_of` gives those of its inputs."""
        packet = getattr(node.target, "overloadpacket", None)
        if packet is _aten.batch_norm:
            return self._batch_norm(node, terms_of)
        if packet in (_aten.add, _aten.sub, _aten.mul, _aten.div, _aten.neg):
            return self._arithmetic(node, packet, terms_of)
        known = packet in _MOVES | _LIMITS | _PRODUCTS | _SUMS | {_aten.avg_pool2d}
        if not known or (packet is _aten.clone and node.kwargs.get("dtype") is not None):
            return None
        parts = [terms_of(other) for other in node.all_input_nodes]
        roundings = max((part.roundings for part in parts), default=0)
        if packet in _LIMITS:
            return parts[0] if len(parts) == 1 else None
        magnitudes = dict(zip(node.all_input_nodes, parts, strict=True))
        given: Any = (node.args, node.kwargs)
        args, kwargs = fx.node.map_arg(given, lambda other: magnitudes[other].magnitude)
        target: Any = node.target
        made: Tensor = target(*args, **kwargs)
        if packet in _PRODUCTS:
            roundings = sum(part.roundings for part in parts) + _products(packet, args) + 1
        elif packet is _aten.avg_pool2d:
            roundings += math.prod(args[1]) + 1
        elif packet in _SUMS:
            roundings += -(-args[0].numel() // max(1, made.numel())) + 1
        return _Terms(made, roundings)

    def _arithmetic(
        self, node: fx.Node, packet: Any, terms_of: Callable[[fx.Node], _Terms]
    ) -> _Terms | None:
        parts = [self._operand(value, terms_of) for value in node.args[:2]]
        first = parts[0]
        if packet is _aten.neg:
            return first
        second = parts[1]
        if packet is _aten.mul:
            made = first.magnitude * second.magnitude
            return _Terms(made, first.roundings + second.roundings + 1)
        if packet is _aten.div:
            if second.roundings or node.kwargs:  # a quotient of sums, or a rounded one
                return None
            return _Terms(first.magnitude / second.magnitude, first.roundings + 1)
        alpha = node.kwargs.get("alpha", 1)
        if not isinstance(alpha, int | float):
            return None
        made = first.magnitude + abs(alpha) * second.magnitude
        return _Terms(made, max(first.roundings, second.roundings) + 2)

    def _operand(self, value: Any, terms_of: Callable[[fx.Node], _Terms]) -> _Terms:
        if isinstance(value, fx.Node):
            return terms_of(value)
        if not isinstance(value, int | float):
            raise _BeyondError
        return _Terms(torch.tensor(abs(float(value))), 0)

    def _batch_norm(self, node: fx.Node, terms_of: Callable[[fx.Node], _Terms]) -> _Terms | None:
        """Return the terms of (x - mean) / sqrt(var + eps) * weight + bias."""
        given: Any = node.args
        x, weight, bias, mean, variance, training, _, eps, *_ = given
        if training or not all(isinstance(one, fx.Node) for one in (x, mean, variance)):
            return None
        first = terms_of(x)
        shape = [1, -1] + [1] * (first.magnitude.dim() - 2)

        def vector(other: Any, default: float) -> Tensor:
            if isinstance(other, fx.Node):
                return self._value(other).abs().view(shape)
            return torch.tensor(default)

        scale = vector(weight, 1.0) / (vector(variance, 1.0) + eps).sqrt()
        made = (first.magnitude + vector(mean, 0.0)) * scale + vector(bias, 0.0)
        return _Terms(made, first.roundings + 5)


def _source(node: fx.Node) -> str:
    return str(node.meta.get("source", node.name))


def _products(packet: Any, args: Any) -> int:
    """Return how many products a sum has."""
    if packet in _WITH_WEIGHT:
        return int(args[1][0].numel())
    first = args[1] if packet in (_aten.addmm, _aten.baddbmm) else args[0]
    return int(first.shape[-1])
