"""Value analysis: whether a value is binary, and where its step is.

A value is binary because of the values that it can take, not the operator that computes it. The
cone of elementwise operators above it is grown, one operator at a time, until it has a single float
source; then it is evaluated, per channel, from -1e30 to 1e30. It is binary if it has two levels
with one step. The step is located exactly, by bisection over the float32 numbers. If the source is
an integer or a bool, the cone is evaluated on values of that type, since integers wrap around.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from biper_engine.conversion.ir import StepRule
from biper_engine.conversion.ranges import created_number, nonnegative
from biper_engine.graph.operator import Numbers
from biper_engine.graph.operators import numbers_of
from biper_engine.graph.patterns import clamp_limits
from biper_engine.graph.reading import (
    arguments,
    constant,
    evaluate,
    is_call,
    parent,
    same_shape,
    shape,
)

__all__ = ["Step", "describe", "find_step", "is_float"]

aten = torch.ops.aten

MAX_CONE = 64
EXTREME = 1e30
NEGLIGIBLE = 2.0**-60
_RESTS = "is a sign whose argument is often exactly 0, so it takes three values, -1, 0 and +1"

_CREATED = (aten.full.default, aten.scalar_tensor.default, aten.ones.default, aten.zeros.default)
_PASS_THROUGH = (
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.reshape.default,
    aten.permute.default,
    aten.mean.dim,
    aten.slice.Tensor,
    aten.constant_pad_nd.default,
)
_MOVES = (
    *(aten.reshape.default, aten.permute.default, aten.constant_pad_nd.default),
    aten.clone.default,
)


@dataclass(frozen=True)
class Step:
    """A binary value: its float source and the rule from source to bit."""

    source: fx.Node
    rule: StepRule


class _NotElementwise(Exception):
    pass


def find_step(graph_module: fx.GraphModule, node: fx.Node, axis: int) -> Step | str:
    """Find the step of a value.

    Args:
        graph_module: the graph, simplified.
        node: the value.
        axis: its channel dimension. If constants vary along another dimension, the value is not a
            function of one number per channel.

    Returns:
        The step, or the reason why the value is not binary, as a clause after "its input".
    """
    reason, fallback = f"is {describe(node)}", None
    if axis % len(shape(node)) == 0:
        return reason  # the dimension along which a cone is evaluated, and of the batch
    if not isinstance(shape(node)[axis], int):
        return reason  # reading its size would fix it
    cone = _Cone(graph_module, node, axis)
    while cone.grow():
        if cone.source is None:
            continue
        if cone.source.meta["val"].dtype == torch.float64:
            continue  # float32 can hold neither its step nor its values
        found = _rule(cone)
        if isinstance(found, str) and reason != _RESTS:
            reason = found
        if not isinstance(found, StepRule) or not same_shape(cone.source, node):
            continue  # a threshold may widen its input
        if not is_float(cone.source):
            fallback = Step(cone.source, found)
        elif found.tie and _takes_third_value(cone, found):
            reason = _RESTS
        else:
            return Step(cone.source, found)
    return fallback or reason


def is_float(node: fx.Node) -> bool:
    """Whether a node's value is a float tensor."""
    return bool(node.meta["val"].dtype.is_floating_point)


def _rule(cone: _Cone) -> StepRule | str | None:
    """Return the rule of a cone with a single source; see `_analyse`."""
    assert cone.source is not None
    if not is_float(cone.source):
        return _analyse_integers(cone)
    found = _analyse(cone)
    if isinstance(found, StepRule) and found.tie and nonnegative(cone.source):
        cone.floor = 0.0  # the sign of a value that is never negative takes two values, 0 and 1
        found = _analyse(cone)
        cone.floor = None
    return found


def _takes_third_value(cone: _Cone, rule: StepRule) -> bool:
    """Whether the value at the step is frequent: the argument rests there, or is an integer."""
    larger: _Cone | None = cone
    while larger is not None:
        assert larger.source is not None
        if not is_float(larger.source):
            return not isinstance(_analyse_integers(larger), StepRule)
        larger = larger.extended()
    return _rests_on_step(cone, rule)


def describe(node: fx.Node) -> str:
    """Name a node's operator for a message."""
    names = {
        **{"relu": "a ReLU", "hardtanh": "a clamp", "clamp": "a clamp", "add": "a sum"},
        **{"batch_norm": "a batch norm", "max_pool2d": "a max pool", "conv2d": "a convolution"},
        **{"avg_pool2d": "an average pool", "linear": "a linear layer"},
    }
    if is_call(node, *_MOVES):
        return describe(parent(node))
    if node.op == "placeholder":
        return "the network's input"
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", str(node.target))
    return names.get(name, f"a float map made by {name}")


class _Cone:
    """The elementwise operators between a value and its sources."""

    def __init__(self, graph_module: fx.GraphModule, top: fx.Node, axis: int) -> None:
        self._graph_module = graph_module
        self._order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
        self.top = top
        self.axis = axis
        self.rank = len(shape(top))
        self.channels = int(shape(top)[axis])
        self.floor: float | None = None  # the least value of the source, if it is known
        self.members: list[fx.Node] = []
        self._frontier: list[fx.Node] = [top]

    @property
    def source(self) -> fx.Node | None:
        """The single input of the cone, or None if it has several."""
        return self._frontier[0] if len(self._frontier) == 1 else None

    def grow(self) -> bool:
        """Add the last operator of the frontier to the cone, if possible."""
        latest = max(self._frontier, key=self._order.__getitem__, default=None)
        if latest is None or len(self.members) >= MAX_CONE:
            return False
        if numbers_of(latest) is not Numbers.ELEMENTWISE:
            return False
        self._frontier.remove(latest)
        self.members.append(latest)
        for operand in latest.all_input_nodes:
            if self._is_constant(operand) or operand in self._frontier or operand in self.members:
                continue
            self._frontier.append(operand)
        return bool(self._frontier)

    def _is_constant(self, node: fx.Node) -> bool:
        return (
            constant(self._graph_module, node) is not None
            or is_call(node, *_CREATED)
            or _is_size(node)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate on probes [P, C]; return [P, C] float64."""
        assert self.source is not None
        layout = [x.shape[0]] + [1] * (self.rank - 1)
        layout[self.axis] = self.channels
        if self.floor is not None:
            x = x.clamp(min=self.floor)
        values = {self.source: x.to(self.source.meta["val"].dtype).reshape(layout)}
        for node in sorted(self.members, key=self._order.__getitem__):
            for operand in node.all_input_nodes:
                if operand not in values:
                    values[operand] = self._constant(operand)
            try:
                values[node] = evaluate(node, values)
            except (RuntimeError, TypeError, ValueError) as cause:
                raise _NotElementwise from cause
        result = values[self.top]
        if list(result.shape) != layout:
            raise _NotElementwise
        return result.reshape(x.shape).double()

    def _constant(self, node: fx.Node) -> Tensor:
        held = constant(self._graph_module, node)
        if held is not None:
            return held
        if is_call(node, aten.scalar_tensor.default):
            return evaluate(node, {})
        number = created_number(node)
        if number is None:
            raise _NotElementwise
        return torch.tensor(number, dtype=node.meta["val"].dtype)

    def extended(self) -> _Cone | None:
        """Return a larger cone that again has a single source, or None."""
        larger = _Cone(self._graph_module, self.top, self.axis)
        larger.members, larger._frontier = list(self.members), list(self._frontier)
        while larger.grow():
            if larger.source is not None:
                return larger
        return None


def _is_size(node: fx.Node) -> bool:
    return is_call(node, aten.sym_size.int)


def _probes(channels: int) -> Tensor:
    powers = torch.exp2(torch.arange(-148, 99, 3, dtype=torch.float64)).float()
    grid = torch.linspace(-8, 8, 257)
    positive = torch.cat([powers, torch.tensor([EXTREME])])
    column = torch.cat([-positive, torch.tensor([-0.0, 0.0]), positive, grid]).sort().values
    return column[:, None].expand(-1, channels)


def _analyse(cone: _Cone) -> StepRule | str | None:
    """Return the rule, a reason against it, or None if the cone cannot be evaluated."""
    probes = _probes(cone.channels)
    try:
        values = cone(probes)
        levels = torch.unique(values)  # type: ignore[no-untyped-call, unused-ignore]
        if levels.isnan().any() or len(levels) > 3:
            return None
        if len(levels) == 1:
            return "is constant"
        low, high = float(levels[0]), float(levels[-1])
        last_start, first_end = _bracket(cone)
    except _NotElementwise:
        return None
    ends = cone(torch.full((1, cone.channels), EXTREME))[0]
    starts = cone(torch.full((1, cone.channels), -EXTREME))[0]
    steady = ends == starts
    sense = torch.where(steady, False, starts == high)
    always = torch.where(ends == high, -torch.inf, torch.inf).float()
    middle = len(levels) == 3
    # A third value lies between the last float of one level and the first of the other.
    at_tie = _next(last_start) if middle else None
    threshold = torch.where(sense, last_start, first_end) if at_tie is None else at_tie
    threshold = torch.where(steady, always, threshold) + 0.0
    rule = StepRule(threshold, sense, low, high, tie=middle or _tells_zeros_apart(cone))
    if _holds(cone, rule, probes, values):
        return rule
    steps = int((values[1:] != values[:-1]).sum(0).max())
    listed = ", ".join(f"{value:g}" for value in levels.tolist())
    near = f"takes values other than {listed} near its step"
    return near if len(levels) == 2 and steps == 1 else _reason_against(levels)


def _analyse_integers(cone: _Cone) -> StepRule | str | None:
    """Return the rule of a cone whose source holds integers or bools; see `_analyse`."""
    assert cone.source is not None
    dtype = cone.source.meta["val"].dtype
    if dtype.is_complex:
        return None
    probes = _integer_probes(dtype)[:, None].expand(-1, cone.channels)
    try:
        values = cone(probes)
        levels = torch.unique(values)  # type: ignore[no-untyped-call, unused-ignore]
        if levels.isnan().any() or len(levels) > 3:
            return None
        if len(levels) != 2:
            listed = ", ".join(f"{value:g}" for value in levels.tolist())
            return "is constant" if len(levels) == 1 else f"takes the values {listed}"
        high = values == levels[1]
        changes = high[1:] != high[:-1]
        if int(changes.sum(0).max()) > 1:
            return _reason_against(levels)
        last, first = _integer_bracket(cone, probes, changes)
    except _NotElementwise:
        return None
    if int(torch.maximum(last.abs(), first.abs()).max()) > 1 << 24:
        return "steps at an integer that float32 cannot hold"
    steady = ~changes.any(0)
    sense = ~steady & high[0]
    threshold = torch.where(sense, last, first).float()
    always = torch.where(high[0], -torch.inf, torch.inf).float()
    threshold = torch.where(steady, always, threshold)
    return StepRule(threshold, sense, float(levels[0]), float(levels[1]), tie=False)


def _integer_probes(dtype: torch.dtype) -> Tensor:
    """Return int64 values in order: all of a small type (16 bits or less), else likely steps."""
    if dtype == torch.bool:
        return torch.tensor([0, 1])
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if most < 1 << 16:
        return torch.arange(least, most + 1)
    powers = [1 << exponent for exponent in range(10, most.bit_length())]
    far = [sign * power + offset for power in powers for sign in (1, -1) for offset in (-1, 0, 1)]
    return torch.tensor(sorted({least, most, *far, *range(-1030, 1031)}))


def _integer_bracket(cone: _Cone, probes: Tensor, changes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last integer of the first level and the first of the other, per channel."""
    index = changes.int().argmax(0)
    where = torch.where(changes.any(0), index, 0)
    last, first = (probes[:, 0][where + offset].clone() for offset in (0, 1))
    start = cone(last[None])[0]
    while bool((first - last > 1).any()):
        middle = last + (first - last) // 2
        before = cone(middle[None])[0] == start
        last = torch.where(before, middle, last)
        first = torch.where(before, first, middle)
    return last, first


def _tells_zeros_apart(cone: _Cone) -> bool:
    """Whether -0.0 and 0.0 give different values, as in `copysign`."""
    zeros = torch.tensor([-0.0, 0.0])[:, None].expand(-1, cone.channels)
    below, above = cone(zeros)
    return bool((below != above).any())


def _reason_against(levels: Tensor) -> str:
    listed = ", ".join(f"{value:g}" for value in levels.tolist())
    return f"takes the values {listed} with more than one step"


def _holds(cone: _Cone, rule: StepRule, probes: Tensor, values: Tensor) -> bool:
    """Check the rule on all probes and close to the step; a third value only at the step itself."""
    keys = _to_key(rule.threshold.nan_to_num(posinf=EXTREME, neginf=-EXTREME))
    near = torch.stack([_from_key(keys + offset) for offset in (-1000, -2, -1, 0, 1, 2, 1000)])
    for x, y in ((probes, values), (near, cone(near))):
        bit = torch.where(rule.sense, x <= rule.threshold, x >= rule.threshold)
        expected = torch.where(bit, rule.high, rule.low).double()
        wrong = y != expected
        allowed = (
            (x == rule.threshold)
            if rule.tie or bool((rule.threshold == 0).any())
            else torch.zeros_like(wrong)
        )
        if bool((wrong & ~allowed).any()):
            return False
    return True


def _bracket(cone: _Cone) -> tuple[Tensor, Tensor]:
    """Return the last float of the first level and the first float of the last, per channel."""
    start = cone(torch.full((1, cone.channels), -EXTREME))
    end = cone(torch.full((1, cone.channels), EXTREME))
    last = _bisect(cone.channels, lambda x: cone(x) != start)
    first = _bisect(cone.channels, lambda x: cone(x) == end)
    return _from_key(last - 1), _from_key(first)


def _bisect(channels: int, after: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the key of the first float for which `after` is true, per channel."""
    low = _to_key(torch.full((channels,), -EXTREME))
    high = _to_key(torch.full((channels,), EXTREME))
    for _ in range(33):
        middle = (low + high) // 2
        holds = after(_from_key(middle)[None])[0]
        high = torch.where(holds, middle, high)
        low = torch.where(holds, low, middle)
    return high


def _to_key(values: Tensor) -> Tensor:
    """Map float32 to int64 in numeric order; -0.0 is -1 and 0.0 is 0."""
    raw = values.float().contiguous().view(torch.int32).long()
    return torch.where(raw < 0, -(raw & 0x7FFFFFFF) - 1, raw)


def _from_key(keys: Tensor) -> Tensor:
    raw = torch.where(keys < 0, (-(keys + 1)) - (1 << 31), keys)
    return raw.to(torch.int32).view(torch.float32)


def _next(values: Tensor) -> Tensor:
    return _from_key(_to_key(values) + 1)


def _rests_on_step(cone: _Cone, rule: StepRule) -> bool:
    """Whether the source is exactly at the step on a whole interval, as after a ReLU."""
    larger: _Cone | None = cone
    while larger is not None:
        probes = _probes(larger.channels)
        third = _third_values(larger, rule, probes)
        if third is None:
            return False
        # Scales turn even smaller values into 0 by underflow; a map does not rest on that interval.
        third &= (probes == 0) | (probes.abs() >= NEGLIGIBLE)
        if int(third.sum(0).max()) > 3:  # -0.0, 0.0 and the grid's 0.0 are the same point
            return True
        largest, larger = larger, larger.extended()
    at_zero = _third_values(largest, rule, torch.zeros(1, largest.channels))
    assert at_zero is not None
    assert largest.source is not None
    return bool(at_zero.any()) and _rests_at_zero(largest.source)


def _third_values(cone: _Cone, rule: StepRule, probes: Tensor) -> Tensor | None:
    """Return where a cone takes neither level; None if it cannot be evaluated."""
    try:
        values = cone(probes)
    except _NotElementwise:
        return None
    return (values != rule.low) & (values != rule.high)


def _rests_at_zero(node: fx.Node) -> bool:
    """Whether a map is exactly 0 in many places, for any input."""
    if is_call(node, aten.round.default, aten.trunc.default):
        return True
    limits = clamp_limits(node)
    if limits is not None:
        return 0 in limits
    if is_call(node, aten.constant_pad_nd.default) and arguments(node)["value"] == 0:
        return True
    if is_call(node, *_PASS_THROUGH):
        return _rests_at_zero(parent(node))
    if is_call(node, aten.cat.default, aten.mul.Tensor):
        return any(_rests_at_zero(operand) for operand in node.all_input_nodes)
    if is_call(node, aten.add.Tensor):
        parents = node.all_input_nodes
        return len(parents) == 2 and all(_rests_at_zero(operand) for operand in parents)
    return False
