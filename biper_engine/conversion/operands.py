"""Operands: find the binary inputs of layers, and make their bits.

A value has few levels if it is a step, or a few, of a float map (`values`), possibly followed by
operators that only move values: zero padding becomes the convolution's own, max pooling is done on
bits; reshape, permute, flip, cat and similar operators are applied to the float map instead.
Otherwise, it has if it can hold only a few numbers (`ranges`); its bits are then made from the
value itself.

Two levels are one binary value. Of more levels, such as -1, 0 and 1, each step is one.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from biper_engine.conversion import ir
from biper_engine.conversion.ir import StepRule
from biper_engine.conversion.ranges import is_move, value_set
from biper_engine.conversion.values import MOST_STEPS, Steps, find_steps, is_float
from biper_engine.geometry import Pool2dGeometry
from biper_engine.graph.editing import call, repeat_call
from biper_engine.graph.operator import Numbers
from biper_engine.graph.operators import numbers_of
from biper_engine.graph.patterns import max_pool_geometry, zero_pad
from biper_engine.graph.reading import arguments, evaluate, is_call, parent, shape

__all__ = ["Operand", "Operands", "peel_padding"]

aten = torch.ops.aten

_LEAST_GAP = 2.0**-6
"""Smallest difference of two numbers over the larger, so that bfloat16 distinguishes them."""


@dataclass(frozen=True)
class Operand:
    """A recognised activation: how to get its bits, and what it replaces in the float graph.

    The value is `offset` plus, for every rule, half of `high - low` times +-1.

    Attributes:
        value: the value.
        axis: its channel dimension.
        rules: one for each binary value of which it is the sum.
        offset: the rest.
        floats: inserts, before a node, the calls that make the float map of the steps, in the
            shape of the value; of a pooled value, in the shape before the pool.
        source: name of the float map, if nothing moves values in between.
        pools: max pools of the bits, in order.
    """

    value: fx.Node
    axis: int
    rules: tuple[StepRule, ...]
    offset: float
    floats: Callable[[fx.Node], fx.Node]
    source: str | None = None
    pools: tuple[tuple[fx.Node, Pool2dGeometry], ...] = ()

    def bits(self, graph_module: fx.GraphModule, before: fx.Node) -> list[fx.Node]:
        """Return the bits of every rule; insert the calls that make them before a node."""
        source = _as_map(graph_module, before, self.floats(before), self.axis)
        made = []
        for rule in self.rules:
            bits = _bits(graph_module, source, rule)
            for node, pool in self.pools:
                bits = _pooled_bits(graph_module, bits, node, pool)
            made.append(bits)
        return made


def peel_padding(x: fx.Node) -> tuple[tuple[int, int, int, int], fx.Node]:
    """Return (top, bottom, left, right) of the zero pads before a layer, and the padded value."""
    total = (0, 0, 0, 0)
    while (pad := zero_pad(x)) is not None and not any(pad[4:]):
        left, right, top, bottom = ([*pad, 0, 0, 0, 0])[:4]
        total = (total[0] + top, total[1] + bottom, total[2] + left, total[3] + right)
        x = parent(x)
    return total, x


class Operands:
    """Finds the operands of a graph, simplified; what it finds of a value is kept."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._graph_module = graph_module
        self._found: dict[tuple[fx.Node, int], Operand | str] = {}
        self._steps: dict[tuple[fx.Node, int], Steps | str] = {}

    def find(self, x: fx.Node, axis: int) -> Operand | str:
        """Return how to get the bits of a value, or why it is not binary, as a clause.

        Args:
            x: the layer's input, before zero padding.
            axis: its channel dimension.
        """
        axis %= max(len(shape(x)), 1)
        if (x, axis) not in self._found:
            self._found[x, axis] = self._find(x, axis)
        return self._found[x, axis]

    def _find(self, x: fx.Node, axis: int) -> Operand | str:
        moved = self._moved(x, axis)
        if moved is not None:
            return moved
        steps = self.steps_of(x, axis)
        if isinstance(steps, str):
            return self._few_numbers(x, axis, steps)
        source = steps.source
        name = source.meta.get("source", source.name)
        return Operand(x, axis, steps.rules, steps.offset, lambda _: source, name)

    def steps_of(self, x: fx.Node, axis: int) -> Steps | str:
        """Return the steps of a value itself, or the reason why it has no few; see `find_steps`."""
        if (x, axis) not in self._steps:
            self._steps[x, axis] = find_steps(self._graph_module, x, axis)
        return self._steps[x, axis]

    def _few_numbers(self, x: fx.Node, axis: int, reason: str) -> Operand | str:
        """Recognise a value that can hold few numbers; its bits are made from the value itself."""
        ties: list[bool] = []

        def steps(value: fx.Node) -> frozenset[float] | None:
            found = self._steps_by_any_axis(value)
            if found is None:
                return None
            ties.extend(rule.tie for rule in found.rules)
            return levels_of(found)

        numbers = sorted(value_set(self._graph_module, x, steps) or ())
        if len(numbers) > MOST_STEPS + 1:
            return f"takes the values {', '.join(f'{number:g}' for number in numbers)}"
        gaps = [high - low for low, high in itertools.pairwise(numbers)]
        if not isinstance(shape(x)[axis], int) or not gaps:
            return reason
        if min(gaps) < _LEAST_GAP * max(map(abs, numbers)):
            return reason
        channels = int(shape(x)[axis])
        rules = tuple(
            _uniform((low + high) / 2, channels, low, high, any(ties))
            for low, high in itertools.pairwise(numbers)
        )
        offset = (numbers[0] + numbers[-1]) / 2
        return Operand(x, axis, rules, offset, lambda _: x)

    def _steps_by_any_axis(self, x: fx.Node) -> Steps | None:
        """Return the steps of a value whose channel dimension is unknown."""
        for axis in _channel_axes(x):
            steps = self.steps_of(x, axis)
            if isinstance(steps, Steps):
                return steps
        return None

    # -- moves ------------------------------------------------------------------------------------

    def _moved(self, x: fx.Node, axis: int) -> Operand | None:
        """Recognise a binary value before an operator that moves values, or return None."""
        if is_call(x, aten.max_pool2d.default) and axis == 1:
            return self._pooled(x)
        if _moves_of(x)[0]:
            return self._rearranged(x, axis)
        if is_call(x, aten.cat.default):
            return self._concatenated(x, axis)
        if is_call(x, aten.constant_pad_nd.default):
            return self._padded(x, axis)
        return None

    def _pooled(self, x: fx.Node) -> Operand | None:
        pool = max_pool_geometry(x)
        inner = self.find(parent(x), 1) if pool is not None else "is a general pool"
        if isinstance(inner, str) or any(rule.low > rule.high for rule in inner.rules):
            return None
        assert pool is not None
        return replace(inner, value=x, source=None, pools=(*inner.pools, (x, pool)))

    def _rearranged(self, x: fx.Node, axis: int) -> Operand | None:
        """Rearrange x before the sign instead of after it."""
        moves, root = _moves_of(x)
        for origin in _channel_axes(root):
            inner = self.find(root, origin)
            if isinstance(inner, str) or inner.pools:
                continue
            rules = _rules_after(inner, moves, x, axis)
            if rules is not None:
                break
        else:
            return None
        found = inner

        def floats(before: fx.Node) -> fx.Node:
            moved = _as_float(self._graph_module, found.floats(before))
            for move in reversed(moves):
                moved = _repeated(self._graph_module.graph, before, move, moved)
            return moved

        return Operand(x, axis, rules, found.offset, floats)

    def _concatenated(self, x: fx.Node, axis: int) -> Operand | None:
        joined_nodes: Sequence[fx.Node] = arguments(x)["tensors"]
        found = [self.find(part, axis) for part in joined_nodes]
        parts = [part for part in found if isinstance(part, Operand) and not part.pools]
        if len(parts) < len(found):
            return None
        along = axis == arguments(x)["dim"] % len(shape(x))
        rules = _joined_rules(parts, along)
        if rules is None:
            return None

        def floats(before: fx.Node) -> fx.Node:
            sources = [_as_float(self._graph_module, part.floats(before)) for part in parts]
            graph, dim = self._graph_module.graph, x.args[1:]
            joined = call(graph, before, aten.cat.default, sources, *dim, like=x)
            joined.meta.pop("source", None)
            return joined

        return Operand(x, axis, rules, parts[0].offset, floats)

    def _padded(self, x: fx.Node, axis: int) -> Operand | None:
        """Pad the float source with a number on the right side of the steps, not with a level."""
        named = arguments(x)
        inner = self.find(named["self"], axis)
        if isinstance(inner, str) or inner.pools:
            return None
        beyond = _number_for(inner, named["value"] or 0.0)
        if beyond is None:
            return None
        channels = int(shape(x)[axis])
        if channels != int(shape(named["self"])[axis]) and not _are_uniform(inner.rules):
            return None
        rules = tuple(
            rule if len(rule.threshold) == channels else rule.resized(channels)
            for rule in inner.rules
        )

        def floats(before: fx.Node) -> fx.Node:
            graph, pad = self._graph_module.graph, aten.constant_pad_nd.default
            source = _as_float(self._graph_module, inner.floats(before))
            wider = call(graph, before, pad, source, named["pad"], beyond, like=x)
            wider.meta.pop("source", None)
            return wider

        return Operand(x, axis, rules, inner.offset, floats)


def levels_of(steps: Steps) -> frozenset[float]:
    """Return the numbers that a value of a few steps takes."""
    if len(steps.rules) == 1:
        return frozenset((steps.rules[0].low, steps.rules[0].high))
    ends = (number for rule in steps.rules for number in (rule.low, rule.high))
    return frozenset(ends)


def _channel_axes(x: fx.Node) -> tuple[int, ...]:
    """Return the dimensions that may be the channels: the second or the last."""
    last = len(shape(x)) - 1
    return tuple(dict.fromkeys((min(1, last), last))) if last >= 0 else ()


def _uniform(threshold: float, channels: int, low: float, high: float, tie: bool) -> StepRule:
    thresholds = torch.full((channels,), threshold, dtype=torch.float32)
    return StepRule(thresholds, torch.zeros(channels, dtype=torch.bool), low, high, tie)


def _are_uniform(rules: Sequence[StepRule]) -> bool:
    return all(rule.uniform for rule in rules)


# -- rules ----------------------------------------------------------------------------------------


def _rules_after(
    inner: Operand, moves: Sequence[fx.Node], x: fx.Node, axis: int
) -> tuple[StepRule, ...] | None:
    """Return the rules of a value after moves; None if a channel gets values of several."""
    channels = int(shape(x)[axis])
    if _are_uniform(inner.rules):
        return tuple(rule.resized(channels) for rule in inner.rules)
    index = _channels_after(inner.value, inner.axis, moves, axis)
    if index is None:
        return None
    return tuple(
        replace(rule, threshold=rule.threshold[index], sense=rule.sense[index])
        for rule in inner.rules
    )


def _channels_after(
    root: fx.Node, origin: int, moves: Sequence[fx.Node], axis: int
) -> Tensor | None:
    """Return the channel of `root` that each channel has after moves, from moving their numbers."""
    sizes = [size if isinstance(size, int) else 1 for size in shape(root)]
    layout = [-1 if dim == origin else 1 for dim in range(len(sizes))]
    value = torch.arange(sizes[origin]).reshape(layout).expand(sizes)
    previous = root
    for move in reversed(moves):
        values: dict[fx.Node, Tensor] = {previous: value}
        for other in move.all_input_nodes:
            if other is not previous:
                values[other] = other.meta["val"] if other.op == "get_attr" else torch.tensor(1)
        try:
            value = evaluate(move, values)
        except (RuntimeError, TypeError, ValueError):  # its arguments fit no batch of 1
            return None
        previous = move
    rows = value.movedim(axis, 0).flatten(1)
    return rows[:, 0] if bool((rows == rows[:, :1]).all()) and rows.shape[1] else None


def _joined_rules(parts: Sequence[Operand], along: bool) -> tuple[StepRule, ...] | None:
    """Return the rules of a concatenation along the channels or not, if the parts' levels agree."""
    levels = {(part.offset, tuple((r.low, r.high) for r in part.rules)) for part in parts}
    if len(levels) != 1:
        return None
    joined = []
    for rules in zip(*(part.rules for part in parts), strict=True):
        threshold, sense = [r.threshold for r in rules], [r.sense for r in rules]
        if not along and not all(_same_rule(rules[0], other) for other in rules):
            return None
        tie = any(rule.tie for rule in rules)
        joined.append(
            StepRule(torch.cat(threshold), torch.cat(sense), rules[0].low, rules[0].high, tie)
            if along
            else replace(rules[0], tie=tie)
        )
    return tuple(joined)


def _number_for(operand: Operand, level: float) -> float | None:
    """Return a number of the float source for which the value is `level`, or None."""
    steps = operand.rules[0].threshold
    for number in (math.inf, -math.inf, float(steps[0])):
        total = torch.full(steps.shape, operand.offset, dtype=torch.float64)
        for rule in operand.rules:
            bit = torch.where(rule.sense, rule.threshold >= number, rule.threshold <= number)
            total += torch.where(bit, 0.5, -0.5) * (rule.high - rule.low)
        finite = all(bool(rule.threshold.isfinite().all()) for rule in operand.rules)
        if finite and bool((total == level).all()):
            return number
    return None


def _same_rule(a: StepRule, b: StepRule) -> bool:
    return torch.equal(a.threshold, b.threshold) and torch.equal(a.sense, b.sense)


# -- calls ----------------------------------------------------------------------------------------


def _moves_of(x: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """Return the moves that end in a value, the last one first, and the value before them."""
    moves: list[fx.Node] = []
    while True:
        if is_call(x, operator.getitem) and numbers_of(parent(x)) is Numbers.SPLIT:
            moves += [x, parent(x)]
        elif is_move(x):
            moves.append(x)
        else:
            return moves, x
        x = parent(moves[-1])


def _repeated(graph: fx.Graph, before: fx.Node, move: fx.Node, x: fx.Node) -> fx.Node:
    """Return a copy of a move with another first argument; an equal one may be there already."""
    rest = move.args[1:]
    for user in x.users:
        if user.target is move.target and user.args == (x, *rest) and user.kwargs == move.kwargs:
            return user
    moved = repeat_call(graph, before, move, x)
    moved.meta.pop("source", None)
    return moved


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

    `find_steps` has checked this for integers and bools; float64 values are only a few.
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


def _bits(graph_module: fx.GraphModule, source: fx.Node, rule: StepRule) -> fx.Node:
    """Return the node of the bits of `source`, shared by all layers that use the same step."""
    for user in source.users:
        if is_call(user, ir.binarize) and _same_rule(user.meta["rule"], rule):
            return user
    with graph_module.graph.inserting_after(source):
        node = graph_module.graph.call_function(ir.binarize, (source,))
    node.meta = {"rule": rule}
    return node


def _pooled_bits(
    graph_module: fx.GraphModule, bits: fx.Node, x: fx.Node, pool: Pool2dGeometry
) -> fx.Node:
    with graph_module.graph.inserting_after(bits):
        node = graph_module.graph.call_function(ir.binary_max_pool, (bits,))
    node.meta = {"pool": pool, "channels": int(shape(x)[1])}
    return node
