"""Value analysis: the step of a map, from the values that it takes."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from biper_engine.bits import binarize
from biper_engine.conversion.capture import capture
from biper_engine.conversion.ir import StepRule
from biper_engine.conversion.simplify import simplify
from biper_engine.conversion.values import Steps, find_steps
from tests.conversion.comparison import Functional, images_of
from tests.conversion.foreign_models import SIGNS, lived_in, where_ge

X = images_of((4, 3, 3))


def step_of(run: Callable[..., Tensor], x: Tensor = X, **layers: nn.Module) -> StepRule | str:
    graph_module = capture(Functional(run, **layers).eval(), (x,)).graph_module
    simplify(graph_module)
    (value,) = graph_module.graph.output_node().args[0]
    found = find_steps(graph_module, value, 1)
    if isinstance(found, str):
        return found
    return found.rules[0] if len(found.rules) == 1 else f"{len(found.rules)} steps"


def around(threshold: float) -> Tensor:
    """Numbers at, next to and far from a threshold, and around zero, as [N, 4, 1, 1]."""
    centre = torch.tensor(threshold)
    near = [torch.nextafter(centre, torch.tensor(side)) for side in (-math.inf, math.inf)]
    tiny = [1e-45, 1e-38, 1e-7, 1.0, 8.0]
    values = [centre, *near, *map(torch.tensor, [0.0, *tiny, *(-t for t in tiny)])]
    return torch.stack(values)[:, None, None, None].expand(-1, 4, 1, 1).contiguous()


TIES = {
    "sign",
    "function",
    "data_assignment",
    "data_in_place",
    "straight_through",
    "bireal",
    "copysign",
}


NOT_OF_ITS_INPUT = {"sign_nudged"}  # its step is found at the outer of two signs


@pytest.mark.some(11)
@pytest.mark.parametrize("name", sorted(SIGNS.keys() - NOT_OF_ITS_INPUT))
def test_every_spelling_of_sign_has_its_own_rule_at_zero(name: str) -> None:
    sign = SIGNS[name]
    rule = step_of(lambda self, x: sign(x))
    assert isinstance(rule, StepRule), rule
    assert (rule.low, rule.high) == (-1.0, 1.0)
    assert rule.uniform
    assert rule.tie is (name in TIES)
    x = around(0.0)
    expected = sign(x.clone())
    got = torch.where(
        binarize(x, rule.threshold.view(-1, 1, 1), rule.sense.view(-1, 1, 1)), 1.0, -1.0
    )
    if rule.tie:
        expected = torch.where(x == 0, 1.0, expected)
    assert torch.equal(got, expected.to(got.dtype))


def test_a_shift_before_a_sign_is_part_of_the_threshold() -> None:
    shift = torch.tensor([0.1, -1 / 3, 0.0, 5e-3]).view(1, -1, 1, 1)

    def run(self: nn.Module, x: Tensor) -> Tensor:
        return torch.sign(x + self.shift)

    model = Functional(run)
    model.register_buffer("shift", shift)
    graph_module = capture(model, (X,)).graph_module
    simplify(graph_module)
    (value,) = graph_module.graph.output_node().args[0]
    found = find_steps(graph_module, value, 1)
    assert isinstance(found, Steps), found
    assert found.source.op == "placeholder"
    (rule,) = found.rules
    assert rule.tie
    for threshold in rule.threshold.tolist():
        x = around(threshold)
        got = binarize(x, rule.threshold.view(-1, 1, 1), rule.sense.view(-1, 1, 1))
        assert torch.equal(got, model(x) >= 0)  # the engine takes an exact zero for 1


SCALES = {
    "AdaBin": lambda s, x: torch.sign((x - s.shift) / s.scale),
    "negated": lambda s, x: torch.sign(0.3 - x * 0.5),
    "of either sign": lambda s, x: torch.sign(x * s.mixed + s.shift),
    "negative": lambda s, x: (-(x + s.shift) / 0.7 > 0.2).float() * 2 - 1,
    "several": lambda s, x: where_ge(((x / 3.0 - 0.25) * s.scale + s.shift) * -2.0),
    "twice as much": lambda s, x: torch.sign(x * 2.0),
}


def steps_behind(run: Callable[..., Tensor]) -> tuple[Steps, nn.Module]:
    model = Functional(run)
    layout = (1, -1, 1, 1)
    model.register_buffer("shift", torch.tensor([0.1, -1 / 3, 0.7, 5e-3]).view(layout))
    model.register_buffer("scale", torch.tensor([0.8, 1.25, 3.0, 1e-3]).view(layout))
    model.register_buffer("mixed", torch.tensor([0.8, -1.25, 3.0, -1e-3]).view(layout))
    graph_module = capture(model, (X,)).graph_module
    simplify(graph_module)
    *_, value = graph_module.graph.output_node().args[0]
    found = find_steps(graph_module, value, 1)
    assert isinstance(found, Steps), found
    return found, model


@pytest.mark.some(3)
@pytest.mark.parametrize("name", SCALES)
def test_scales_before_a_sign_are_part_of_the_threshold(name: str) -> None:
    found, model = steps_behind(SCALES[name])
    assert found.source.op == "placeholder"
    (rule,) = found.rules
    for threshold in [*rule.threshold.tolist(), 0.1, -0.7]:
        x = around(threshold)
        bit = binarize(x, rule.threshold.view(-1, 1, 1), rule.sense.view(-1, 1, 1))
        got, wanted = torch.where(bit, 1.0, -1.0), model(x)
        assert torch.equal(got, torch.where(wanted == 0, got, wanted))
        assert rule.tie or bool((wanted != 0).all())


@pytest.mark.parametrize(
    "run",
    [
        lambda s, x: torch.sign(x * 0.25),  # 0 for numbers that are not 0
        lambda s, x: torch.sign(x * 1.5 - 0.3),  # 0 for two neighbours
        lambda s, x: torch.sign(x * x.mean()),
        lambda s, x: torch.sign((x * s.shift.mT) / 3.0),
    ],
)
def test_other_scales_before_a_sign_stay(run: Callable[..., Tensor]) -> None:
    found, _ = steps_behind(run)
    assert found.source.op == "call_function"


def test_a_scaled_value_with_another_use_stays() -> None:
    found, _ = steps_behind(lambda s, x: (lambda y: (y, torch.sign(y)))(x * 1.5 + 0.1))
    assert found.source.op == "call_function"
    found, _ = steps_behind(lambda s, x: (lambda y: torch.sign(y) + torch.sign(y) * 2)(x * 1.5))
    assert found.source.op == "placeholder"


def test_a_shifted_value_that_is_used_otherwise_stays_the_source() -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        shifted = x + 0.25
        return torch.sign(shifted + 0.5) * shifted

    graph_module = capture(Functional(run), (X,)).graph_module
    simplify(graph_module)
    (value,) = graph_module.graph.output_node().args[0]
    found = find_steps(graph_module, value.args[0], 1)
    assert isinstance(found, Steps), found
    assert found.source is value.args[1]
    (rule,) = found.rules
    assert rule.uniform
    assert rule.threshold[0] == -0.5


def test_a_third_value_at_the_step_lies_between_the_levels() -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        return torch.where(x == 0.3, 7.0, torch.sign(x - 0.3))

    assert step_of(run) == "takes the value 7 at its step"


@pytest.mark.parametrize(
    ("run", "levels"),
    [
        (lambda self, x: torch.where(x > 0.1, 0.25, 0.5), (0.25, 0.5)),
        (lambda self, x: torch.where(x <= 1e-30, 0.25, 0.5), (0.25, 0.5)),
        (lambda self, x: (x < -0.7).float(), (0, 1)),
        (lambda self, x: (x >= 1 / 3).type_as(x) * 6 - 2, (-2, 4)),
        (lambda self, x: ((x.clamp(-1, 1) + 1) / 2).round() * 2 - 1, (-1, 1)),
        (lambda self, x: torch.where(~(x * 3 - 1 > 0), 1.0, 0.0), (0, 1)),
    ],
)
def test_thresholds_are_found_to_the_last_bit(
    run: Callable[..., Tensor], levels: tuple[float, float]
) -> None:
    model = Functional(run)
    graph_module = capture(model, (X,)).graph_module
    simplify(graph_module)
    (value,) = graph_module.graph.output_node().args[0]
    found = find_steps(graph_module, value, 1)
    assert isinstance(found, Steps), found
    (rule,) = found.rules
    assert (rule.low, rule.high) == levels
    for threshold in [*rule.threshold[:1].tolist(), 0.1, 1 / 3]:
        x = around(threshold)
        source = x if found.source.op == "placeholder" else x * 3  # the threshold has the 1
        got = binarize(source, rule.threshold.view(-1, 1, 1), rule.sense.view(-1, 1, 1))
        assert torch.equal(got, model(x) > (rule.low + rule.high) / 2)


@pytest.mark.some(4)
@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: torch.sign(torch.cat([x, F.relu(x)], 1)),
        lambda self, x: torch.sign(x.round()),
        lambda self, x: torch.sign(F.softshrink(x, 0.1)),
        lambda self, x: torch.sign(F.gelu(x)),
        lambda self, x: torch.sign(F.gelu(x, approximate="tanh")),
        lambda self, x: torch.sign(F.silu(x)),
        lambda self, x: torch.sign(F.hardswish(x)),
        lambda self, x: torch.sign(F.max_pool2d(x.round(), 2)),
    ],
)
def test_a_sign_that_is_often_0_has_two_steps(run: Callable[..., Tensor]) -> None:
    assert step_of(run) == "2 steps"


def test_a_value_that_turns_has_no_steps() -> None:
    found = step_of(lambda self, x: torch.where(x < -2, 0.5, where_ge(x)))
    assert found == "takes the values -1, 0.5, 1 with more than one step"


def test_channels_have_their_own_thresholds_and_directions() -> None:
    limit = torch.tensor([0.5, 0.125, -3.0, 0.0]).view(1, 4, 1, 1)
    flipped = torch.tensor([False, True, False, True]).view(1, 4, 1, 1)
    rule = step_of(lambda self, x: torch.where((x >= limit) ^ flipped, 1.0, -1.0))
    assert isinstance(rule, StepRule)
    below = torch.nextafter(limit, torch.tensor(-math.inf)).flatten()
    expected = torch.where(flipped.flatten(), below, limit.flatten())
    assert rule.threshold.tolist() == expected.tolist()
    assert rule.sense.tolist() == [False, True, False, True]


def test_a_channel_that_never_changes_has_an_infinite_threshold() -> None:
    limit = torch.tensor([0.5, -math.inf, math.inf, 0.0]).view(1, 4, 1, 1)
    rule = step_of(lambda self, x: torch.where(x >= limit, 1.0, -1.0))
    assert isinstance(rule, StepRule)
    assert rule.threshold.tolist() == [0.5, -math.inf, math.inf, 0.0]


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda self, x: F.relu(x), "a ReLU"),
        (lambda self, x: x + x.mean(), "a sum"),
        (lambda self, x: F.hardtanh(x), "a clamp"),
        (lambda self, x: torch.sign(x - 1) * where_ge(x), "more than one step"),
        (lambda self, x: torch.ones_like(x), "is constant"),
    ],
)
def test_what_is_not_binary_says_why(run: Callable[..., Tensor], reason: str) -> None:
    found = step_of(run)
    assert isinstance(found, str)
    assert any(words in found for words in reason.split("|")), found


@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: torch.sign(self.norm(F.relu(x))),
        lambda self, x: torch.sign(self.norm(F.max_pool2d(F.relu(x), 2))),
        lambda self, x: torch.sign(F.relu(x) - 0.5),
        lambda self, x: torch.where(F.relu(x) > 0, 1.0, -1.0),
        lambda self, x: torch.sign(F.hardtanh(x)),
        lambda self, x: torch.sign(F.relu(x) + x),
    ],
)
def test_a_relu_far_from_the_step_does_no_harm(run: Callable[..., Tensor]) -> None:
    norm = nn.BatchNorm2d(4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lived_in(norm)
    assert isinstance(step_of(run, norm=norm), StepRule)


@pytest.mark.parametrize("scale", [0.5, 1e-8, 1e-20])
def test_values_that_underflow_before_a_sign_keep_its_step(scale: float) -> None:
    """BatchNorm's first weight in BiPer's ImageNet networks is 1e-8, its offset 0."""
    found = step_of(lambda self, x: torch.sign(F.hardtanh(x * 1e-2 * scale)))
    assert isinstance(found, StepRule)
    assert bool((found.threshold == 0).all())


def test_a_threshold_that_widens_its_input_is_a_step_of_the_comparison() -> None:
    thresholds = torch.linspace(-1, 1, 4).view(1, 4, 1, 1)
    found = step_of(lambda self, x: torch.where(x > thresholds, 1.0, -1.0), images_of((1, 3, 3)))
    assert isinstance(found, StepRule)
    assert found.threshold.tolist() == [1.0] * 4  # of a bool, as float32


NEVER_NEGATIVE: dict[str, Callable[..., Tensor]] = {
    "relu": lambda self, x: torch.sign(F.relu(x)),
    "relu and a pool": lambda self, x: torch.sign(F.max_pool2d(F.relu(x), 2)),
    "two relus": lambda self, x: torch.sign(F.relu(x) + F.relu(x.flip(1))),
    "clamp": lambda self, x: torch.sign(F.hardtanh(x, 0, 6)),
    "relu, scaled to where it underflows": lambda self, x: torch.sign(F.relu(x) * 1e-8),
    "average of squares": lambda self, x: torch.sign(F.avg_pool2d(x.abs(), 2)),
}


@pytest.mark.parametrize("name", NEVER_NEGATIVE)
def test_the_sign_of_what_is_never_negative_takes_0_and_1(name: str) -> None:
    found = step_of(NEVER_NEGATIVE[name])
    assert isinstance(found, StepRule)
    assert (found.low, found.high, found.tie) == (0, 1, False)
    assert found.threshold.tolist() == [2.0**-149] * 4


INTEGERS: dict[str, tuple[torch.dtype, Callable[..., Tensor], float, bool]] = {
    "uint8, above": (torch.uint8, lambda self, x: torch.where(x > 127, 1.0, -1.0), 128, False),
    "uint8, below": (torch.uint8, lambda self, x: (x < 100).float() * 2 - 1, 99, True),
    "uint8, widened": (torch.uint8, lambda self, x: sign_of(x.int() - 128), 128, False),
    "uint8, wrapped": (torch.uint8, lambda self, x: sign_of((x - 128).float() - 128), 0, False),
    "int8": (torch.int8, lambda self, x: sign_of(x * 2), 0, False),
    "int32": (torch.int32, lambda self, x: sign_of(x - 70_000), 70_000, False),
    "int64": (torch.int64, lambda self, x: sign_of(-x - 12_345), -12_345, True),
    "bool": (torch.bool, lambda self, x: x.float() * 2 - 1, 1, False),
}


def sign_of(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


@pytest.mark.parametrize("name", INTEGERS)
def test_steps_of_integers_are_found_on_integers(name: str) -> None:
    dtype, run, threshold, sense = INTEGERS[name]
    x = (X * 1e5).to(dtype) if dtype in (torch.int32, torch.int64) else (X * 100 + 128).to(dtype)
    graph_module = capture(Functional(run), (x,)).graph_module
    simplify(graph_module)
    (value,) = graph_module.graph.output_node().args[0]
    found = find_steps(graph_module, value, 1)
    assert isinstance(found, Steps), found
    bits = binarize(
        fx_value(graph_module, found.source.name, x).float(),
        found.rules[0].threshold.view(-1, 1, 1),
        found.rules[0].sense.view(-1, 1, 1),
    )
    assert torch.equal(
        torch.where(bits, found.rules[0].high, found.rules[0].low).float(), run(None, x)
    )
    if found.source.op == "placeholder":
        assert found.rules[0].threshold.tolist() == [threshold] * 4
        assert found.rules[0].sense.tolist() == [sense] * 4


def fx_value(graph_module: fx.GraphModule, name: str, x: Tensor) -> Tensor:
    """Return the value of a node."""
    interpreter = fx.Interpreter(graph_module, garbage_collect_values=False)
    interpreter.run(x)
    return next(value for node, value in interpreter.env.items() if node.name == name)


@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: torch.sign(x.int() - 128),
        lambda self, x: torch.sign(x.float() - 128),
        lambda self, x: torch.sign(x.float() * 2 - 256),
    ],
)
def test_a_sign_of_integers_that_reach_0_takes_three_values(run: Callable[..., Tensor]) -> None:
    graph_module = capture(Functional(run), ((X * 100 + 128).to(torch.uint8),)).graph_module
    simplify(graph_module)
    (value,) = graph_module.graph.output_node().args[0]
    found = find_steps(graph_module, value, 1)
    assert isinstance(found, Steps)
    assert [(rule.low, rule.high) for rule in found.rules] == [(-1, 0), (0, 1)] or [
        (rule.low, rule.high) for rule in found.rules
    ] == [(-1, 0), (1, 0)]
