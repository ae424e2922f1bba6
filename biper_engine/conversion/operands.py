"""Operands: find the binary inputs of layers, and make their bits.

A value is binary if it is a step of a float map (`values`), possibly followed by operators that
only move values: zero padding becomes the convolution's own, max pooling is done on bits; reshape,
permute, flip, cat and similar operators are applied to the float map instead. Otherwise, it is
binary if it can hold only two numbers (`ranges`); its bits are then made from the value itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from biper_engine.conversion import ir
from biper_engine.conversion.ir import StepRule
from biper_engine.conversion.ranges import is_move, value_set
from biper_engine.conversion.values import Step, find_step, is_float
from biper_engine.graph.editing import call, repeat_call
from biper_engine.graph.patterns import max_pool_geometry, zero_pad
from biper_engine.graph.reading import arguments, is_call, parent, shape

__all__ = ["Operand", "binary_value", "peel_padding"]

aten = torch.ops.aten

_LEAST_GAP = 2.0**-6
"""Smallest difference of two numbers over the larger, so that bfloat16 distinguishes them."""


@dataclass(frozen=True)
class Operand:
    """A recognised activation: how to get its bits, and what it replaces in the float graph."""

    value: fx.Node
    rule: StepRule
    build: Callable[[fx.Node], fx.Node]  # inserts the calls that make the bits before a node
    source: str | None = None  # the float map, if nothing moves values in between


def binary_value(graph_module: fx.GraphModule, x: fx.Node, axis: int) -> Operand | str:
    """Return how to get the bits of a value, or why it is not binary, as a clause.

    Args:
        graph_module: the graph, simplified.
        x: the layer's input, before zero padding.
        axis: its channel dimension.
    """
    moved = _moved(graph_module, x, axis)
    if moved is not None:
        return moved
    step = find_step(graph_module, x, axis)
    if isinstance(step, str):
        return _two_values(graph_module, x, axis, step)

    def build(before: fx.Node) -> fx.Node:
        return _bits(graph_module, before, _as_map(graph_module, before, step.source, axis), step)

    return Operand(x, step.rule, build, step.source.meta.get("source", step.source.name))


def peel_padding(x: fx.Node) -> tuple[tuple[int, int, int, int], fx.Node]:
    """Return (top, bottom, left, right) of the zero pads before a layer, and the padded value."""
    total = (0, 0, 0, 0)
    while (pad := zero_pad(x)) is not None and not any(pad[4:]):
        left, right, top, bottom = ([*pad, 0, 0, 0, 0])[:4]
        total = (total[0] + top, total[1] + bottom, total[2] + left, total[3] + right)
        x = parent(x)
    return total, x


def _two_values(graph_module: fx.GraphModule, x: fx.Node, axis: int, reason: str) -> Operand | str:
    """Recognise a value that can hold only two numbers; its bits are made from the value itself."""
    ties = []

    def steps(value: fx.Node) -> frozenset[float] | None:
        step = _step_by_any_axis(graph_module, value)
        if step is None:
            return None
        ties.append(step.rule.tie)
        return frozenset((step.rule.low, step.rule.high))

    numbers = sorted(value_set(graph_module, x, steps) or ())
    if len(numbers) > 2:
        return f"takes the values {', '.join(f'{number:g}' for number in numbers)}"
    if len(numbers) < 2 or numbers[1] - numbers[0] < _LEAST_GAP * max(map(abs, numbers)):
        return reason
    low, high = numbers
    channels = int(shape(x)[axis])
    threshold = torch.full((channels,), (low + high) / 2, dtype=torch.float32)
    rule = StepRule(threshold, torch.zeros(channels, dtype=torch.bool), low, high, any(ties))

    def build(before: fx.Node) -> fx.Node:
        source = _as_map(graph_module, before, x, axis)
        return _bits(graph_module, before, source, Step(source, rule))

    return Operand(x, rule, build)


def _step_by_any_axis(graph_module: fx.GraphModule, x: fx.Node) -> Step | None:
    """Return the step of a value whose channel dimension is unknown: the second or the last."""
    last = len(shape(x)) - 1
    for axis in dict.fromkeys((min(1, last), last)):
        step = find_step(graph_module, x, axis) if last >= 0 else ""
        if isinstance(step, Step):
            return step
    return None


def _uniform_step(graph_module: fx.GraphModule, x: fx.Node) -> Step | None:
    """Return the step of a value if all its elements share one."""
    step = _step_by_any_axis(graph_module, x)
    return step if step is not None and step.rule.uniform else None


def _as_map(graph_module: fx.GraphModule, before: fx.Node, x: fx.Node, axis: int) -> fx.Node:
    """Return `x` as [N, C, H, W]; features in the last dimension become channels of 1x1 maps."""
    x = _as_float(graph_module, x)
    if len(shape(x)) == 4 and axis == 1:
        return x
    features = int(shape(x)[-1])
    new = call(graph_module.graph, before, aten.reshape.default, x, [-1, features, 1, 1], like=x)
    new.meta["val"] = x.meta["val"].reshape(-1, features, 1, 1)
    new.meta.pop("source", None)
    return new


def _as_float(graph_module: fx.GraphModule, x: fx.Node) -> fx.Node:
    """Return a value that is not a float map as float32, which distinguishes its values.

    `find_step` has checked this for integers and bools; float64 values are only two.
    """
    if is_float(x) and x.meta["val"].dtype != torch.float64:
        return x
    for user in x.users:
        if is_call(user, aten._to_copy.default) and user.kwargs == {"dtype": torch.float32}:
            return user
    with graph_module.graph.inserting_after(x):
        node = graph_module.graph.call_function(
            aten._to_copy.default, (x,), {"dtype": torch.float32}
        )
    node.meta = {"val": x.meta["val"].float(), "exact": True}
    return node


def _bits(graph_module: fx.GraphModule, before: fx.Node, source: fx.Node, step: Step) -> fx.Node:
    """Return the node of the bits of `source`, shared by all layers that use the same step."""
    for user in source.users:
        if is_call(user, ir.binarize) and _same_rule(user.meta["rule"], step.rule):
            return user
    with graph_module.graph.inserting_after(source):
        node = graph_module.graph.call_function(ir.binarize, (source,))
    node.meta = {"rule": step.rule}
    return node


def _same_rule(a: StepRule, b: StepRule) -> bool:
    return torch.equal(a.threshold, b.threshold) and torch.equal(a.sense, b.sense)


def _moved(graph_module: fx.GraphModule, x: fx.Node, axis: int) -> Operand | None:
    """Recognise a binary value before an operator that moves values, or return None."""
    if is_call(x, aten.max_pool2d.default) and axis == 1:
        return _pooled(graph_module, x)
    if is_move(x):
        return _rearranged(graph_module, x, axis)
    if is_call(x, aten.cat.default) and axis == arguments(x)["dim"] % len(shape(x)):
        return _concatenated(graph_module, x, axis)
    if is_call(x, aten.constant_pad_nd.default):
        return _padded(graph_module, x, axis)
    return None


def _pooled(graph_module: fx.GraphModule, x: fx.Node) -> Operand | None:
    pool = max_pool_geometry(x)
    inner = binary_value(graph_module, parent(x), 1) if pool is not None else "is a general pool"
    if isinstance(inner, str):
        return None

    def build(before: fx.Node) -> fx.Node:
        bits = inner.build(before)
        with graph_module.graph.inserting_after(bits):
            node = graph_module.graph.call_function(ir.binary_max_pool, (bits,))
        node.meta = {"pool": pool, "channels": int(shape(x)[1])}
        return node

    return Operand(x, inner.rule, build)


def _rearranged(graph_module: fx.GraphModule, x: fx.Node, axis: int) -> Operand | None:
    """Rearrange x before the sign instead of after it, if all elements share one step."""
    moves, root = [x], parent(x)
    while is_move(root):
        moves.append(root)
        root = parent(root)
    step = _uniform_step(graph_module, root)
    if step is None:
        return None
    rule = step.rule.resized(int(shape(x)[axis]))

    def build(before: fx.Node) -> fx.Node:
        moved = _as_float(graph_module, step.source)
        for move in reversed(moves):
            moved = repeat_call(graph_module.graph, before, move, moved)
            moved.meta.pop("source", None)
        source = _as_map(graph_module, before, moved, axis)
        return _bits(graph_module, before, source, Step(source, rule))

    return Operand(x, rule, build)


def _concatenated(graph_module: fx.GraphModule, x: fx.Node, axis: int) -> Operand | None:
    joined_nodes: Sequence[fx.Node] = arguments(x)["tensors"]
    parts = [find_step(graph_module, part, axis) for part in joined_nodes]
    steps = [part for part in parts if isinstance(part, Step)]
    if len(steps) < len(parts) or len({(s.rule.low, s.rule.high) for s in steps}) != 1:
        return None
    rule = StepRule(
        torch.cat([s.rule.threshold for s in steps]),
        torch.cat([s.rule.sense for s in steps]),
        steps[0].rule.low,
        steps[0].rule.high,
        any(s.rule.tie for s in steps),
    )

    def build(before: fx.Node) -> fx.Node:
        joined = call(
            graph_module.graph,
            before,
            aten.cat.default,
            [_as_float(graph_module, s.source) for s in steps],
            *x.args[1:],
            like=x,
        )
        joined.meta.pop("source", None)
        source = _as_map(graph_module, before, joined, axis)
        return _bits(graph_module, before, source, Step(source, rule))

    return Operand(x, rule, build)


def _padded(graph_module: fx.GraphModule, x: fx.Node, axis: int) -> Operand | None:
    """Pad the float source with a value beyond the step, instead of padding with a level."""
    named = arguments(x)
    step = find_step(graph_module, named["self"], axis)
    if axis != 1 or isinstance(step, str) or not step.rule.uniform or any(named["pad"][4:]):
        return None
    value = named["value"] or 0.0
    if value not in (step.rule.low, step.rule.high):
        return None
    above = (value == step.rule.high) != bool(step.rule.sense[0])

    def build(before: fx.Node) -> fx.Node:
        beyond = math.inf if above else -math.inf
        wider = call(
            graph_module.graph,
            before,
            aten.constant_pad_nd.default,
            _as_float(graph_module, step.source),
            named["pad"],
            beyond,
            like=x,
        )
        wider.meta.pop("source", None)
        return _bits(graph_module, before, wider, Step(wider, step.rule))

    return Operand(x, step.rule, build)
