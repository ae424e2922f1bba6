"""Functions with one slope for negative values and another for the rest, such as Maxout.

ReLU, leaky ReLU, PReLU, absolute values, negation, factors per channel and sums of these make of
one value the function `slope * v if v < 0 else gain * v`, per channel. AdaBin's Maxout is
`p * relu(v) - q * relu(-v)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.graph.reading import arguments, is_call, same_shape

__all__ = ["TwoSlopes", "two_slopes"]

aten = torch.ops.aten

_OPERATORS = (
    *(aten.relu.default, aten.abs.default, aten.leaky_relu.default, aten._prelu_kernel.default),
    *(aten.neg.default, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor),
)

_LONGEST = 12
"""Operators to look at behind a value."""


@dataclass(frozen=True)
class TwoSlopes:
    """A function of one value.

    Attributes:
        nodes: operators that compute it, in order; nothing else uses the value or their results,
            but for the last one's.
        slope: float64 [C], factor of negative values.
        gain: float64 [C], factor of the others.
    """

    nodes: tuple[fx.Node, ...]
    slope: Tensor
    gain: Tensor


def two_slopes(
    value: fx.Node, channels: int, constant_of: Callable[[Any, fx.Node], Tensor | None]
) -> TwoSlopes | None:
    """Return the shortest such function of a value that has two slopes, or None if there is none.

    Args:
        value: a map or a matrix with `channels` channels.
        channels: C.
        constant_of: returns an operand of a node as float64 [C], or None if it is not constant per
            channel.
    """
    one = torch.ones(channels, dtype=torch.float64)
    pieces = {value: (one, one)}
    cone: list[fx.Node] = []
    for node in _behind(value):
        pair = _apply(node, pieces, constant_of) if is_call(node, *_OPERATORS) else None
        if pair is None or not same_shape(node, value):
            continue
        pieces[node] = pair
        cone.append(node)
        closed = all(set(cone).issuperset(member.users) for member in (value, *cone[:-1]))
        if closed and not torch.equal(*pair):
            return TwoSlopes(tuple(cone), *pair)
    return None


def _behind(value: fx.Node) -> list[fx.Node]:
    """Return the operators that follow from a value within a few steps, in the graph's order."""
    reached: set[fx.Node] = {value}
    nodes: list[fx.Node] = []
    node = value.next
    while node.op != "root" and len(nodes) < _LONGEST:
        if node.op == "call_function" and reached.intersection(node.all_input_nodes):
            reached.add(node)
            nodes.append(node)
        node = node.next
    return nodes


def _apply(
    node: fx.Node,
    pieces: dict[fx.Node, tuple[Tensor, Tensor]],
    constant_of: Callable[[Any, fx.Node], Tensor | None],
) -> tuple[Tensor, Tensor] | None:
    """Return slope and gain behind an operator, or None if it makes another kind of function."""
    named = arguments(node)
    left, right = (
        pieces.get(x) if isinstance(x, fx.Node) else None
        for x in (node.args[0], named.get("other"))
    )
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        if left is None or right is None or named["alpha"] != 1:
            return None
        sign = 1 if is_call(node, aten.add.Tensor) else -1
        return left[0] + sign * right[0], left[1] + sign * right[1]
    if is_call(node, aten.mul.Tensor, aten.div.Tensor):
        divides = is_call(node, aten.div.Tensor)
        piece, factor = (left, named["other"]) if left is not None else (right, node.args[0])
        factor = constant_of(factor, node)
        if piece is None or factor is None or (divides and left is None):
            return None
        factor = 1 / factor if divides else factor
        return piece[0] * factor, piece[1] * factor
    if left is None:
        return None
    # A negative v times a slope below 0 is positive, and so is another v times a gain above 0.
    slope, gain = left
    low: Tensor | None = None
    if is_call(node, aten.neg.default):
        return -slope, -gain
    if is_call(node, aten.relu.default):
        low = torch.zeros_like(slope)
    elif is_call(node, aten.abs.default):
        low = -torch.ones_like(slope)
    elif is_call(node, aten.leaky_relu.default):
        low = torch.full_like(slope, float(named["negative_slope"]))
    elif is_call(node, aten._prelu_kernel.default):
        low = constant_of(named["weight"], node)
    if low is None:
        return None
    return torch.where(slope > 0, slope * low, slope), torch.where(gain < 0, gain * low, gain)
