"""Converted networks, written by hand as `torch.fx` graphs, without using the conversion."""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from biper_engine.bits import pack_weight
from biper_engine.converted import ConvertedNetwork
from biper_engine.engine import Engine
from biper_engine.graph.signature import InputSpec, Signature
from biper_engine.metadata import Metadata, Provenance
from biper_engine.report import ConversionReport, LayerReport

_aten, _biper = torch.ops.aten, torch.ops.biper


class GraphBuilder:
    """Collects nodes and constants; `module` makes the GraphModule."""

    def __init__(self, seed: int = 0) -> None:
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(seed)

    def input(self, name: str) -> fx.Node:
        return self.graph.placeholder(name)

    def constant(self, target: str, value: Tensor) -> fx.Node:
        self.constants[target] = value
        return self.graph.create_node("get_attr", target, name=target.replace(".", "_"))

    def call(self, name: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.create_node("call_function", target, args, kwargs, name=name)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def operands(self, path: str, channels: int, out: int, *, bits: bool) -> tuple[fx.Node, ...]:
        """Weights and epilogue of a 3x3 binary convolution under a module path."""
        weight = pack_weight(self.normal(out, channels, 3, 3) >= 0)
        nodes = [
            self.constant(f"{path}.weight", weight),
            self.constant(f"{path}.multiplier", self.normal(out) * 0.1),
            self.constant(f"{path}.bias", self.normal(out)),
        ]
        if bits:
            nodes.append(self.constant(f"{path}.threshold", self.normal(out)))
            nodes.append(self.constant(f"{path}.sense", self.normal(out) > 0))
        return tuple(nodes)

    def module(self, *outputs: Any) -> fx.GraphModule:
        self.graph.output(outputs)
        return fx.GraphModule(self.constants, self.graph)


def leaf_report(*, packed: int = 2) -> ConversionReport:
    layers = tuple(
        LayerReport(
            name=f"layer1.{i}.conv",
            kind="conv2d",
            packed=i < packed,
            reason="" if i < packed else "its input is a ReLU",
            shape=(33, 33, 3, 3),
            macs=33 * 33 * 9 * 64,
            weight_bits_before=33 * 33 * 9 * 32,
            weight_bits_after=33 * 9 * 64,
        )
        for i in range(packed + 1)
    )
    return ConversionReport(layers=layers, bytes_before=80_000, bytes_after=9_000)


def signature(inputs: dict[str, tuple[int, ...]], args: Any, kwargs: Any, out: Any) -> Signature:
    """Make a float32 signature; leaves of `args`, `kwargs` and `out` are any values."""
    return Signature(
        in_spec=pytree.tree_structure((args, kwargs)),
        out_spec=pytree.tree_structure(out),
        inputs=tuple(InputSpec(n, torch.float32, (None, *shape)) for n, shape in inputs.items()),
    )


def engine_of(module: fx.GraphModule, form: Signature) -> Engine:
    """Return an engine of a graph, with some report."""
    return Engine(ConvertedNetwork(module, signature=form, report=leaf_report()))


def classifier_graph(seed: int = 0, *, channels: int = 33) -> fx.GraphModule:
    """Stem, a residual binary convolution, one to bits, a bit pool, one to floats, a linear."""
    g = GraphBuilder(seed)
    image = g.input("image")
    weight = g.constant("conv1.weight", g.normal(channels, 3, 3, 3) * 0.3)
    stem = g.call("stem", _aten.conv2d.default, image, weight, None, [1, 1], [1, 1])
    bits = g.call("stem_bits", _biper.binarize.default, stem)
    same = {"in_channels": channels, "stride": [1, 1], "padding": [1, 1, 1, 1]}
    pair = g.call(
        "layer1_0",
        _biper.bconv2d_float_bits.default,
        bits,
        *g.operands("layer1.0.conv1", channels, channels, bits=True),
        residual=stem,
        clamp_min=-1.0,
        clamp_max=float("inf"),
        **same,
    )
    floats = g.call("layer1_0_floats", operator.getitem, pair, 0)
    second = g.call("layer1_0_bits", operator.getitem, pair, 1)
    third = g.call(
        "layer1_1",
        _biper.bconv2d_bits.default,
        second,
        *g.operands("layer1.1.conv1", channels, 40, bits=True),
        **same,
    )
    pooled = g.call("pool", _biper.bmaxpool2d.default, third, 40, [2, 2], stride=[2, 2])
    last = g.call(
        "layer2_0",
        _biper.bconv2d_float.default,
        pooled,
        *g.operands("layer2.0.conv1", 40, channels, bits=False),
        dtype=torch.float32,
        **{**same, "in_channels": 40},
    )
    shortcut = g.call("shortcut", _aten.avg_pool2d.default, floats, [2, 2], [2, 2])
    total = g.call("total", _aten.add.Tensor, last, shortcut)
    mean = g.call("mean", _aten.mean.dim, total, [2, 3])
    flat = g.call("flat", _aten.reshape.default, mean, [-1, channels])
    head = g.constant("fc.weight", g.normal(10, channels))
    logits = g.call("logits", _aten.linear.default, flat, head, g.constant("fc.bias", g.normal(10)))
    return g.module(logits)


def classifier(seed: int = 0, *, graph: fx.GraphModule | None = None, **changes: Any) -> Engine:
    """An engine of `classifier_graph` for images of 3x8x8."""
    arguments: dict[str, Any] = {
        "signature": signature({"image": (3, 8, 8)}, (0,), {}, 0),
        "report": leaf_report(),
        "metadata": Metadata(
            input_size=(3, 8, 8), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), class_names=("a", "b")
        ),
        "provenance": Provenance(architecture="hand", frequency=20.0, stage=2, licence="MIT"),
        "options": {"keep_float": ["fc"]},
    }
    module = classifier_graph(seed) if graph is None else graph
    return Engine(ConvertedNetwork(module, **{**arguments, **changes}))


def two_inputs() -> Engine:
    """`net(image, extra={"mask": m})` returns {"maps": [a, b], "image": image}."""
    g = GraphBuilder(1)
    image, mask = g.input("image"), g.input("mask")
    product = g.call("product", _aten.mul.Tensor, image, mask)
    bits = g.call("bits", _biper.binarize.default, product)
    a = g.call(
        "a",
        _biper.bconv2d_float.default,
        bits,
        *g.operands("neck.conv", 3, 8, bits=False),
        in_channels=3,
        padding=[1, 1, 1, 1],
    )
    scale = g.constant("scale", g.normal(1))
    b = g.call("b", _aten.mul.Tensor, a, scale)
    form = signature(
        {"image": (3, 6, 6), "mask": (1, 6, 6)},
        (0,),
        {"extra": {"mask": 0}},
        {"maps": [0, 0], "image": 0},
    )
    return engine_of(g.module(a, b, image), form)
