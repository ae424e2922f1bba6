"""The engine's operators on OpenVINO: equal on integers, for which rounding cannot differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from biper_engine import bits as contract
from biper_engine.errors import ExportError
from biper_engine.export.openvino_bits import strict_threshold
from biper_engine.export.openvino_graph import binary_model, translate
from tests.networks_by_hand import GraphBuilder, classifier_graph

biper, aten = torch.ops.biper, torch.ops.aten


def run(graph_module: fx.GraphModule, images: Tensor) -> Tensor:
    """Run a graph on OpenVINO in float32."""
    pytest.importorskip("openvino", reason='pip install "biper-engine[bench]"')
    from biper_engine.bench.rivals.open_vino import OpenVinoNetwork

    model = binary_model(graph_module, tuple(images.shape))
    return OpenVinoNetwork(model, 1, "f32")(images)


class Graph(GraphBuilder):
    """One binary convolution of integer multiplier and bias, on bits with integer thresholds."""

    def integers(self, *shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=self.random).float()

    def bits(self, channels: int) -> fx.Node:
        threshold = self.constant("bits.threshold", self.integers(channels))
        sense = self.constant("bits.sense", self.normal(channels) > 0)
        return self.call("bits", biper.binarize.default, self.input("image"), threshold, sense)

    def convolution(self, bits: fx.Node, channels: int, out: int, **options: Any) -> fx.Node:
        size = options.pop("kernel_size", 3)
        positive = self.normal(out, channels, size, size) >= 0
        tensors = {n: v for n, v in options.items() if isinstance(v, Tensor)}
        held = {name: self.constant(f"conv.{name}", value) for name, value in tensors.items()}
        return self.call(
            "conv",
            biper.bconv2d_float.default,
            bits,
            self.constant("conv.weight", contract.pack_weight(positive)),
            self.constant("conv.multiplier", self.integers(out)),
            self.constant("conv.bias", self.integers(out)),
            in_channels=channels,
            **{**options, **held},
        )


def assert_equal_on_ties(g: Graph, result: fx.Node, channels: int) -> None:
    module = g.module(result)
    images = Graph(9).integers(2, channels, 9, 8)
    wanted = module(images)[0]
    assert torch.equal(run(module, images), wanted)
    assert wanted.unique().numel() > 2


@pytest.mark.parametrize("channels", [8, 24, 32, 40, 64, 72])
def test_channels_fill_bytes(channels: int) -> None:
    g = Graph()
    conv = g.convolution(g.bits(channels), channels, 5, padding=[1, 1, 1, 1])
    assert_equal_on_ties(g, conv, channels)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": [2, 1], "padding": [0, 2, 1, 0]},
        {"dilation": [2, 2], "padding": [2, 2, 2, 2]},
        {"kernel_size": 1, "stride": [2, 2]},
        {"clamp_min": -3.0},
        {"clamp_min": -3.0, "clamp_max": 4.0},
        {"slope": torch.tensor([2.0, -1.0, 0.0, 3.0, 1.0]), "shift": torch.arange(5.0)},
        {"pool_kernel_size": [2, 2], "pool_stride": [2, 2]},
        {"window": torch.tensor([1.0, -2.0, 0.0, 3.0, 1.0]), "padding": [1, 0, 2, 1]},
        {
            "taps": torch.tensor([1.0, -2.0, 0.0, 3.0, 1.0]),
            "valid": torch.tensor([2.0, 1.0, -1.0, 0.0, 1.0]),
            "window": torch.tensor([1.0, 1.0, -1.0, 0.0, 2.0]),
            "padding": [1, 1, 1, 1],
            "stride": [2, 1],
        },
        {
            "pool_kernel_size": [3, 3],
            "pool_stride": [2, 2],
            "pool_padding": [1, 1],
            "pool_min": torch.tensor([True, False, True, True, False]),
        },
    ],
    ids="-".join,
)
def test_geometry_and_epilogue(options: dict[str, Any]) -> None:
    g = Graph(1)
    assert_equal_on_ties(g, g.convolution(g.bits(40), 40, 5, **options), 40)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_pool_of_bits_comes_before_them(mixed: bool) -> None:
    g = Graph(2)
    take_and = g.constant("take_and", g.normal(16) > 0) if mixed else None
    options = {"stride": [2, 2], "padding": [1, 1], "take_and": take_and}
    pooled = g.call("pool", biper.bmaxpool2d.default, g.bits(16), 16, [3, 3], **options)
    assert_equal_on_ties(g, g.convolution(pooled, 16, 5), 16)


def test_a_whole_network_gives_the_engines_logits() -> None:
    module = classifier_graph(channels=40)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    wanted = module(images)[0]
    # float32 sums of 300 products in another order
    torch.testing.assert_close(run(module, images), wanted, rtol=1e-5, atol=1e-5)


def test_the_inputs_of_float_layers() -> None:
    g = GraphBuilder(3)
    x = g.input("image")
    weight = g.constant("grouped.weight", g.normal(6, 2, 3, 3))
    x = g.call("grouped", aten.conv2d.default, x, weight, None, [1, 1], [1, 1], [1, 1], 2)
    x = g.call("hardtanh", aten.hardtanh.default, x, -1.0, 1.5)
    x = g.call("pad", aten.constant_pad_nd.default, x, [1, 0, 0, 2, 1, 1], 0.5)
    statistics = [g.constant(f"bn.{n}", g.normal(8).abs() + 0.5) for n in ("w", "b", "mean", "var")]
    x = g.call("bn", aten.batch_norm.default, x, *statistics, False, 0.1, 1e-5, False)
    x = g.call("relu", aten.relu.default, x)
    x = g.call("max", aten.max_pool2d.default, x, [3, 3], [2, 2], [1, 1])
    x = g.call("average", aten.avg_pool2d.default, x, [2, 2], [2, 1], [1, 1], False, False)
    x = g.call("mean", aten.mean.dim, x, [2, 3], True)
    x = g.call("clamp", aten.clamp.default, x, None, 2.0)
    module = g.module(g.call("flat", aten.reshape.default, x, [-1, 8]))
    images = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(run(module, images), module(images)[0], rtol=1e-5, atol=1e-5)


def test_what_openvino_lacks_is_reported() -> None:
    pytest.importorskip("openvino", reason='pip install "biper-engine[bench]"')
    g = Graph()
    weight = g.constant("conv.weight", contract.pack_weight(g.normal(4, 1, 3, 3) >= 0))
    operands = [g.constant(f"conv.{name}", g.normal(4)) for name in ("multiplier", "bias")]
    options = {"in_channels": 4, "groups": 4}
    conv = g.call("conv", biper.bconv2d_float.default, g.bits(4), weight, *operands, **options)
    with pytest.raises(ExportError, match="no binary convolution with groups"):
        binary_model(g.module(conv), (1, 4, 5, 5))
    with pytest.raises(ExportError, match="do not fill bytes; this one has 33"):
        binary_model(classifier_graph(), (1, 3, 8, 8))
    g = Graph()
    with pytest.raises(ExportError, match=r"'sin' is not translated to OpenVINO"):
        binary_model(g.module(g.call("sin", aten.sin.default, g.input("x"))), (1, 4, 5, 5))


def test_a_strict_comparison_gives_the_engines_bit() -> None:
    inf = float("inf")
    tiny = torch.finfo(torch.float32).tiny
    values = torch.tensor([-inf, -3.0, -tiny, -0.0, 0.0, tiny, 1.0, 1.0000001, inf])
    finite = values[1:-1]
    for threshold in [*values, torch.tensor(float("nan"))]:
        for inverted in (False, True):
            one, sense = threshold.reshape(1), torch.tensor([inverted])
            limit = strict_threshold(one, sense)
            assert limit.isfinite().all()
            wanted = contract.binarize(finite, one, sense)
            assert torch.equal((finite > limit) ^ sense, wanted), (threshold, inverted)


@pytest.mark.parametrize(
    "call",
    [
        lambda g, x, held: g.call("r", aten.add.Tensor, x, held, alpha=2),
        lambda g, x, held: g.call("r", aten.add.Tensor, x, 3),
        lambda g, x, held: g.call("r", aten.sub.Tensor, held, x),
        lambda g, x, held: g.call("r", aten.mul.Tensor, x, held),
        lambda g, x, held: g.call("r", aten.mul.Tensor, x, 0.5),
        lambda g, x, held: g.call("r", aten.div.Tensor, x, 4.0),
        lambda g, x, held: g.call("r", aten.maximum.default, x, held),
        lambda g, x, held: g.call("r", aten.cat.default, [x, x], 1),
        lambda g, x, held: g.call("r", aten.sigmoid.default, x),
        lambda g, x, held: g.call("r", aten.neg.default, x),
        lambda g, x, held: g.call("r", aten._prelu_kernel.default, x, held),
        lambda g, x, held: g.call("r", aten.slice.Tensor, x, 2, 0, 9223372036854775807, 2),
        lambda g, x, held: g.call("r", aten.slice.Tensor, x, 3, 1, 4),
        lambda g, x, held: g.call("r", aten.slice.Tensor, x, 1, 0, -1),
        lambda g, x, held: g.call("r", aten.slice.Tensor, x, -1, -3),
    ],
)
def test_float_operators_around_binary_layers(call: Any) -> None:
    g = Graph()
    module = g.module(call(g, g.input("x"), g.constant("held", g.integers(1, 3, 1, 1))))
    images = torch.randint(-4, 5, (2, 3, 4, 5), generator=g.random).float()
    assert torch.allclose(run(module, images), module(images)[0], atol=1e-6)


def test_a_layer_that_openvino_has_no_bits_for_is_a_float_convolution() -> None:
    pytest.importorskip("openvino", reason='pip install "biper-engine[export]"')
    import openvino

    for channels, options in ((6, {}), (16, {"groups": 2})):
        g = Graph()
        bits = g.bits(channels)
        weight = g.constant("w", contract.pack_weight(g.normal(8, channels // 2, 3, 3) >= 0))
        if not options:
            weight = g.constant("w", contract.pack_weight(g.normal(8, channels, 3, 3) >= 0))
        vectors = [g.constant(f"v{i}", g.integers(8)) for i in range(2)]
        conv = g.call(
            *("conv", biper.bconv2d_float.default, bits, weight, *vectors),
            in_channels=channels,
            padding=[1, 0, 2, 1],
            gate=g.input("gate"),
            **options,
        )
        module = g.module(conv)
        images = torch.randint(-4, 5, (2, channels, 5, 6), generator=g.random).float()
        gate = g.integers(2, 8)
        made = translate(module, [images.shape, gate.shape])
        assert [line.partition(":")[0] for line in made.float_layers] == ["conv"]
        compiled = openvino.Core().compile_model(
            made.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        got = torch.from_numpy(compiled([images.numpy(), gate.numpy()])[0])
        assert torch.equal(got, module(images, gate)[0])
