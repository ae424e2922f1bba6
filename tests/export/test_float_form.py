"""The operators on bits in float operators: equal on integers, for which rounding cannot differ."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from biper_engine.export.float_form import float_form
from tests.graph.calls import CALLS, CHANNEL, CONV, FUSED, MAP, SENSE, Flowing, x
from tests.networks_by_hand import GraphBuilder, classifier, classifier_graph

biper = torch.ops.biper
N = MAP.shape[0]
POOL = {"pool_kernel_size": [3, 2], "pool_stride": [2, 1], "pool_padding": [1, 0]}
SUMS = dict.fromkeys(("window", "taps", "valid"), CHANNEL)
BIPER_CALLS = [
    *[call for call in CALLS if call[0].startswith("biper.")],
    ("biper.bconv2d_float", {**FUSED, **POOL, "pool_min": SENSE}),
    ("biper.bconv2d_float", {**FUSED, **SUMS, "padding": [1, 0, 2, 1], "stride": [2, 1]}),
    ("biper.bconv2d_float", {**FUSED, "padding": [2, 2, 2, 2], "dilation": [2, 2]}),
    ("biper.bconv2d_float", {**FUSED, "gate": x(N, 1, 1, 1), "slope": CHANNEL, "gain": CHANNEL}),
    ("biper.bmaxpool2d", {"kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1]}),
]


def integers(value: Tensor) -> Tensor:
    """Return vectors of floats as small integers of both signs."""
    return (value * 7).round() - 3 if value.is_floating_point() else value


class Call(GraphBuilder):
    """One call, whose packed maps are the signs of integer inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def operand(self, name: str, value: Any, images: int) -> Any:
        if isinstance(value, Tensor):
            return self.constant(name, integers(value))
        if not isinstance(value, Flowing):
            return value
        batch, *sizes = value.shape
        if value.channels is not None:
            sizes = [value.channels, *sizes[:2]]
        shape = [images if batch == N else batch, *sizes]
        numbers = torch.randint(-4, 5, shape, generator=self.random)
        self.tensors.append(numbers.to(value.dtype if value.channels is None else torch.float32))
        node = self.input(name)
        return node if value.channels is None else self.call("signs", biper.binarize.default, node)


def network(name: str, arguments: Mapping[str, Any]) -> tuple[fx.GraphModule, list[Tensor]]:
    g = Call()
    if name == "biper.bmaxpool2d":
        arguments = {"bits": CONV["bits"], "channels": 40, **arguments}
        arguments["take_and"] = torch.arange(40) % 3 == 0
    target = getattr(biper, name.removeprefix("biper.")).default
    named = {key: g.operand(key, value, 3) for key, value in arguments.items()}
    result: Any = g.call("result", target, **named)
    bits = result
    if name == "biper.bconv2d_float_bits":
        result, bits = (g.call(f"part{i}", operator.getitem, result, i) for i in (0, 1))
    outputs = [result]
    if name in ("biper.binarize", "biper.bmaxpool2d") or name.endswith("_bits"):
        channels = 40 if "pool2d" in name else 8
        if name == "biper.binarize":
            channels = int(arguments["x"].shape[1])
        outputs = outputs if bits is not result else []
        outputs += [g.call("read", biper.unbinarize.default, bits, channels)]
    return g.module(*outputs), g.tensors


@pytest.mark.parametrize(("name", "arguments"), BIPER_CALLS)
def test_an_operator_on_bits_equals_its_float_form(name: str, arguments: Mapping[str, Any]) -> None:
    module, inputs = network(name, arguments)
    form = float_form(module, inputs)
    assert not any("biper" in str(node.target) for node in form.graph.nodes)
    for ours, theirs in zip(module(*inputs), form(*inputs), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name
        assert ours.unique().numel() > 1


def test_every_operator_on_bits_has_a_float_form() -> None:
    from biper_engine.graph.operators import OPERATORS

    wanted = {name for name in OPERATORS if name.startswith("biper.")}
    assert {name for name, _ in BIPER_CALLS} == wanted


def test_groups_and_computed_thresholds_stay_right() -> None:
    g = Call()
    weight = torch.randint(0, 2**31, (6, 3, 3, 1), generator=g.random, dtype=torch.int32) & 31
    g.tensors.append(torch.randint(-4, 5, (2, 10, 5, 6), generator=g.random).float())
    bits = g.call("bits", biper.binarize.default, g.input("x"))
    options = {"in_channels": 10, "groups": 2, "padding": [1, 1, 1, 1]}
    module = g.module(
        g.call("conv", biper.bconv2d.default, bits, g.constant("weight", weight), **options)
    )
    assert torch.equal(module(*g.tensors)[0], float_form(module, g.tensors)(*g.tensors)[0])


def test_a_threshold_that_is_never_reached_gives_minus_one() -> None:
    g = GraphBuilder()
    limits = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    sense = torch.tensor([True, False, False, True])
    held = (g.constant("threshold", limits), g.constant("sense", sense))
    bits = g.call("bits", biper.binarize.default, g.input("x"), *held)
    module = g.module(g.call("read", biper.unbinarize.default, bits, 4))
    values = torch.tensor([-1.0, -0.0, 0.0, 1e-40, 3.0]).view(5, 1, 1, 1).expand(5, 4, 1, 1)
    assert torch.equal(module(values)[0], float_form(module, [values])(values)[0])


def test_a_network_in_float_form_shares_its_float_tensors_and_leaves_it_unchanged() -> None:
    module, images = classifier_graph(), torch.randn(2, 3, 8, 8)
    before = str(module.graph)
    form = float_form(module, [images])
    assert str(module.graph) == before
    held = {tensor.data_ptr() for tensor in form.buffers()}
    assert module.fc.weight.data_ptr() in held
    engine = classifier(graph=module)
    assert torch.allclose(form(images)[0], engine(images), atol=1e-5)
