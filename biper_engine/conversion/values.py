"""Value analysis: whether a value is binary, and where its step is.

A value is binary because of the values that it can take, not the operator that computes it. The
cone of elementwise operators above it is grown, one operator at a time, until it has a single float
source; then it is evaluated, per channel, from -1e30 to 1e30. It is binary if it has two levels
with one step. The step is located exactly, by bisection over the float32 numbers. If the source is
an integer or a bool, the cone is evaluated on values of that type, since integers wrap around.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from biper_engine.conversion.cones import (
    EXTREME,
    Cone,
    NotElementwiseError,
    from_key,
    probes_of,
    to_key,
)
from biper_engine.conversion.ir import StepRule
from biper_engine.conversion.ranges import created_number, is_move, nonnegative
from biper_engine.graph.patterns import clamp_limits
from biper_engine.graph.reading import (
    arguments,
    constant,
    is_call,
    parent,
    same_shape,
    shape,
)

__all__ = ["Steps", "describe", "find_steps", "is_float"]

aten = torch.ops.aten

MOST_STEPS = 3
NEGLIGIBLE = 2.0**-60

_PASS_THROUGH = (
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.mean.dim,
    aten.constant_pad_nd.default,
)
_SCALES = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.neg.default),
    *(aten.mul.Tensor, aten.div.Tensor),
)
_MOVES = (
    *(aten.reshape.default, aten.permute.default, aten.constant_pad_nd.default),
    aten.clone.default,
)


@dataclass(frozen=True)
class Steps:
    """A value of few levels: its float source, and a rule for each step.

    The value is `offset` plus, for every rule, half of `high - low` times +-1.
    """

    source: fx.Node
    rules: tuple[StepRule, ...]
    offset: float

    @classmethod
    def of_one(cls, source: fx.Node, rule: StepRule) -> Steps:
        """Return a binary value, of two levels."""
        return cls(source, (rule,), (rule.low + rule.high) / 2)


def find_steps(graph_module: fx.GraphModule, node: fx.Node, axis: int) -> Steps | str:
    """Find the steps of a value: one if it can be had, else at most `MOST_STEPS`.

    Args:
        graph_module: the graph, simplified.
        node: the value.
        axis: its channel dimension. If constants vary along another dimension, the value is not a
            function of one number per channel.

    Returns:
        The steps, or the reason why the value has no few levels, as a clause after "its input".
    """
    reason, fallback = f"is {describe(node)}", None
    several: Steps | None = None
    if axis % len(shape(node)) == 0:
        return reason  # the dimension along which a cone is evaluated, and of the batch
    if not isinstance(shape(node)[axis], int):
        return reason  # reading its size would fix it
    cone = Cone(graph_module, node, axis)
    while cone.grow():
        if cone.source is None:
            continue
        if cone.source.meta["val"].dtype == torch.float64:
            continue  # float32 can hold neither its step nor its values
        found = _rule(cone)
        if isinstance(found, str):
            reason = found
        if not same_shape(cone.source, node):
            continue  # a threshold may widen its input
        if isinstance(found, StepRule) and not is_float(cone.source):
            fallback = Steps.of_one(cone.source, found)
        elif isinstance(found, StepRule) and not (found.tie and _takes_third_value(cone, found)):
            return _before_scales(cone, Steps.of_one(cone.source, found))
        elif several is None:
            several = _several(cone)
    return fallback or several or reason


def _before_scales(cone: Cone, steps: Steps) -> Steps:
    """Move a step before constant scales and shifts of its source, so that the threshold has them.

    The thresholds are found from the float32 results themselves, so that no bit changes. It may be
    possible only before several: `y / 3` is 0 for some y that are not, but `(x - 0.1) / 3` is not
    for x other than 0.1. A source that has other uses stays: it is computed anyway, and the layer
    before it can have one result.
    """
    last: fx.Node | None = steps.source
    while last is not None and is_call(last, *_SCALES) and _only_for_signs(cone, last):
        last = cone.source if cone.grow() else None
        if last is None or not same_shape(last, cone.top):
            break
        if last.meta["val"].dtype != torch.float32:
            break
        found = _rule(cone)
        if isinstance(found, StepRule) and not (found.tie and _takes_third_value(cone, found)):
            steps = Steps.of_one(last, found)
    return steps


def _only_for_signs(cone: Cone, source: fx.Node) -> bool:
    """Whether all users of a cone's source do what those in the cone do, as two signs of it."""
    own = {user.target for user in source.users if user in cone.members}
    return all(user.target in own for user in source.users)


def is_float(node: fx.Node) -> bool:
    """Whether a node's value is a float tensor."""
    return bool(node.meta["val"].dtype.is_floating_point)


def _rule(cone: Cone) -> StepRule | str | None:
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


def _takes_third_value(cone: Cone, rule: StepRule) -> bool:
    """Whether the value at the step is frequent: the argument rests there, or is an integer."""
    larger: Cone | None = cone
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
        "binary_conv": "a binary layer",
    }
    if is_call(node, *_MOVES):
        return describe(parent(node))
    if node.op == "placeholder":
        return "the network's input"
    target = getattr(node.target, "overloadpacket", node.target)
    name = getattr(target, "__name__", str(target))
    return names.get(name, f"a float map made by {name}")


def _analyse(cone: Cone | _Above) -> StepRule | str | None:
    """Return the rule, a reason against it, or None if the cone cannot be evaluated."""
    probes = probes_of(cone.channels)
    try:
        values = cone(probes)
        levels = torch.unique(values)  # type: ignore[no-untyped-call, unused-ignore]
        if levels.isnan().any() or len(levels) > 3:
            return None
        if len(levels) == 1:
            return "is constant"
        low, high = float(levels[0]), float(levels[-1])
        last_start, first_end = _bracket(cone)
    except NotElementwiseError:
        return None
    ends = cone(torch.full((1, cone.channels), EXTREME))[0]
    starts = cone(torch.full((1, cone.channels), -EXTREME))[0]
    steady = ends == starts
    sense = torch.where(steady, False, starts == high)
    always = torch.where(ends == high, -torch.inf, torch.inf).float()
    # A third value lies between the last float of one level and the first of the other. The sign of
    # a sum with a constant has one that the probes may have missed.
    between = _next(last_start)
    gap = (between < first_end) & ~steady
    middle = len(levels) == 3 or bool(gap.any())
    third = cone(between[None])[0][gap]
    if not bool(((third >= low) & (third <= high)).all()):
        return f"takes the value {float(third[0]):g} at its step"
    threshold = torch.where(gap, between, torch.where(sense, last_start, first_end))
    threshold = torch.where(steady, always, threshold) + 0.0
    rule = StepRule(threshold, sense, low, high, tie=middle or _tells_zeros_apart(cone))
    if _holds(cone, rule, probes, values):
        return rule
    steps = int((values[1:] != values[:-1]).sum(0).max())
    listed = ", ".join(f"{value:g}" for value in levels.tolist())
    near = f"takes values other than {listed} near its step"
    return near if len(levels) == 2 and steps == 1 else _reason_against(levels)


class _Above:
    """Whether a cone's value is above a cut, as a cone of two levels."""

    def __init__(self, cone: Cone, low: float, high: float) -> None:
        self._cone = cone
        self._levels = low, high
        self.channels = cone.channels
        self.source = cone.source

    def __call__(self, x: Tensor) -> Tensor:
        low, high = self._levels
        return torch.where(self._cone(x) > (low + high) / 2, high, low).double()


def _several(cone: Cone) -> Steps | None:
    """Return the steps of a cone with few levels that never turns; None if it has others.

    A sign whose argument is often exactly 0 is one: it takes -1, 0 and 1.
    """
    assert cone.source is not None
    dtype = cone.source.meta["val"].dtype
    if dtype.is_complex:
        return None
    floats = dtype.is_floating_point
    probes = probes_of(cone.channels) if floats else _integer_probes(dtype)[:, None]
    try:
        levels = torch.unique(cone(probes.expand(-1, cone.channels)))  # type: ignore[no-untyped-call, unused-ignore]
        if levels.isnan().any() or not 2 < len(levels) <= MOST_STEPS + 1:
            return None
        rules = []
        for low, high in itertools.pairwise(levels.tolist()):
            above = _Above(cone, low, high)
            rule = _analyse(above) if floats else _analyse_integers(above)
            if not isinstance(rule, StepRule) or rule.tie:
                return None
            near = _near(rule) if floats else _near_integers(rule, dtype)
            exact = _without_subnormals(above, rule) if floats else rule
            if exact is None or not bool(torch.isin(cone(near), levels).all()):
                return None
            rules.append(exact)
    except NotElementwiseError:
        return None
    return Steps(cone.source, tuple(rules), float(levels[0] + levels[-1]) / 2)


def _without_subnormals(cone: _Above, rule: StepRule) -> StepRule | None:
    """Write `x >= 1e-45` as not `x <= 0`: a processor may be set to read subnormal numbers as 0."""
    if not bool(_subnormal(rule.threshold).any()):
        return rule
    threshold = from_key(to_key(rule.threshold) + torch.where(rule.sense, 1, -1)) + 0.0
    threshold = torch.where(rule.threshold.isinf(), rule.threshold, threshold)
    other = StepRule(threshold, ~rule.sense, rule.high, rule.low, rule.tie)
    probes = torch.cat([probes_of(cone.channels), _near(other)])
    exact = _holds(cone, other, probes, cone(probes)) and not bool(_subnormal(threshold).any())
    return other if exact else None


def _subnormal(values: Tensor) -> Tensor:
    return (values.abs() < torch.finfo(torch.float32).tiny) & (values != 0)


def _analyse_integers(cone: Cone | _Above) -> StepRule | str | None:
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
    except NotElementwiseError:
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
    least, most = _limits(dtype)
    if most < 1 << 16:
        return torch.arange(least, most + 1)
    powers = [1 << exponent for exponent in range(10, most.bit_length())]
    far = [sign * power + offset for power in powers for sign in (1, -1) for offset in (-1, 0, 1)]
    return torch.tensor(sorted({least, most, *far, *range(-1030, 1031)}))


def _integer_bracket(cone: Cone | _Above, probes: Tensor, changes: Tensor) -> tuple[Tensor, Tensor]:
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


def _tells_zeros_apart(cone: Cone | _Above) -> bool:
    """Whether -0.0 and 0.0 give different values, as in `copysign`."""
    zeros = torch.tensor([-0.0, 0.0])[:, None].expand(-1, cone.channels)
    below, above = cone(zeros)
    return bool((below != above).any())


def _reason_against(levels: Tensor) -> str:
    listed = ", ".join(f"{value:g}" for value in levels.tolist())
    return f"takes the values {listed} with more than one step"


def _holds(cone: Cone | _Above, rule: StepRule, probes: Tensor, values: Tensor) -> bool:
    """Check the rule on all probes and close to the step; a third value only at the step itself."""
    near = _near(rule)
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


def _near(rule: StepRule) -> Tensor:
    """Return floats around the step, [P, C]."""
    keys = to_key(rule.threshold.nan_to_num(posinf=EXTREME, neginf=-EXTREME))
    return torch.stack([from_key(keys + offset) for offset in (-1000, -2, -1, 0, 1, 2, 1000)])


def _near_integers(rule: StepRule, dtype: torch.dtype) -> Tensor:
    steps = torch.where(rule.threshold.isinf(), 0, rule.threshold).long()
    near = torch.stack([steps + offset for offset in (-2, -1, 0, 1, 2)])
    return near.clamp(0, 1) if dtype == torch.bool else near.clamp(*_limits(dtype))


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


def _bracket(cone: Cone | _Above) -> tuple[Tensor, Tensor]:
    """Return the last float of the first level and the first float of the last, per channel."""
    start = cone(torch.full((1, cone.channels), -EXTREME))
    end = cone(torch.full((1, cone.channels), EXTREME))
    last = _bisect(cone.channels, lambda x: cone(x) != start)
    first = _bisect(cone.channels, lambda x: cone(x) == end)
    return from_key(last - 1), from_key(first)


def _bisect(channels: int, after: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the key of the first float for which `after` is true, per channel."""
    low = to_key(torch.full((channels,), -EXTREME))
    high = to_key(torch.full((channels,), EXTREME))
    for _ in range(33):
        middle = (low + high) // 2
        holds = after(from_key(middle)[None])[0]
        high = torch.where(holds, middle, high)
        low = torch.where(holds, low, middle)
    return high


def _next(values: Tensor) -> Tensor:
    return from_key(to_key(values) + 1)


def _rests_on_step(cone: Cone, rule: StepRule) -> bool:
    """Whether the source is exactly at the step on a whole interval, as after a ReLU."""
    larger: Cone | None = cone
    while larger is not None:
        probes = probes_of(larger.channels)
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


def _third_values(cone: Cone, rule: StepRule, probes: Tensor) -> Tensor | None:
    """Return where a cone takes neither level; None if it cannot be evaluated."""
    try:
        values = cone(probes)
    except NotElementwiseError:
        return None
    return (values != rule.low) & (values != rule.high)


def _rests_at_zero(node: fx.Node) -> bool:
    """Whether a map is exactly 0 in many places, for any input."""
    module = node.graph.owning_module
    assert module is not None
    held = constant(module, node)
    if held is not None:
        return bool((held == 0).any())
    if created_number(node) == 0:
        return True
    if is_call(node, aten.round.default, aten.trunc.default):
        return True
    limits = clamp_limits(node)
    if limits is not None:
        return 0 in limits
    if is_call(node, aten.constant_pad_nd.default) and arguments(node)["value"] == 0:
        return True
    if is_call(node, *_PASS_THROUGH) or is_move(node):
        return _rests_at_zero(parent(node))
    if is_call(node, aten.cat.default, aten.mul.Tensor):
        return any(_rests_at_zero(operand) for operand in node.all_input_nodes)
    if is_call(node, aten.add.Tensor):
        parents = node.all_input_nodes
        return len(parents) == 2 and all(_rests_at_zero(operand) for operand in parents)
    if is_call(node, torch.ops.biper.bmatmul_float.default):  # a scaled sum of integers
        named = arguments(node)
        return not any(named[name] for name in ("row_multiplier", "column_multiplier", "bias"))
    return False
