"""Networks written by hand for the tests of fusing, and the contents of a fused graph."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.bits import unpack_channels
from biper_engine.engine import Engine
from biper_engine.graph.reading import biper_op, get_constant
from biper_engine.graph.signature import InputSpec
from biper_engine.ops.stem import PLAN_OPERATORS
from biper_engine.runtime.fusing import fuse_ends
from tests.networks_by_hand import GraphBuilder

_aten, _biper = torch.ops.aten, torch.ops.biper
CPU = torch.device("cpu")


def fused(
    module: fx.GraphModule, *shapes: Sequence[int], dtype: torch.dtype = torch.float32
) -> fx.GraphModule:
    """Return a network with all that can be fused; `shapes` are without the batch."""
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    specs = [InputSpec(n, dtype, (None, *s)) for n, s in zip(names, shapes, strict=True)]
    return fuse_ends(module, CPU, specs, ops=PLAN_OPERATORS)


def fused_engine(engine: Engine) -> fx.GraphModule:
    return fuse_ends(engine.graph_module, CPU, engine.signature.inputs, ops=PLAN_OPERATORS)


def operators(module: fx.GraphModule) -> list[str]:
    """Return the operators of a graph in order, getitem left out."""
    found = []
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            found.append(biper_op(node) or str(node.target).split(".")[1])
    return found


def the(module: fx.GraphModule, op: str) -> fx.Node:
    (node,) = [node for node in module.graph.nodes if biper_op(node) == op]
    return node


def options(module: fx.GraphModule, op: str) -> dict[str, Any]:
    """Return the keyword arguments of the only node of an operator, tensors looked up."""
    return {
        name: get_constant(module, str(value.target)) if isinstance(value, fx.Node) else value
        for name, value in the(module, op).kwargs.items()
    }


class StemBuilder(GraphBuilder):
    """A network that begins as given and returns the bits, and the floats if wanted."""

    def __init__(self, *, channels: int = 3, out: int = 40, dtype: torch.dtype = torch.float32):
        super().__init__(2)
        self.channels, self.out, self.dtype = channels, out, dtype
        self.x = self.input("x")

    def conv(self, x: fx.Node, kernel: int = 3, *rest: Any, bias: bool = True) -> fx.Node:
        weight = self.normal(self.out, self.channels, kernel, kernel) / kernel**2
        nodes = [self.constant("conv.weight", weight.to(self.dtype)), None]
        if bias:
            nodes[1] = self.constant("conv.bias", self.normal(self.out).to(self.dtype))
        rest = rest or ([1, 1], [kernel // 2])
        return self.call("conv", _aten.conv2d.default, x, *nodes, *rest)

    def bits(self, x: fx.Node, name: str = "bits") -> fx.Node:
        threshold = self.constant(f"{name}.threshold", self.normal(self.out) / 8)
        sense = self.constant(f"{name}.sense", torch.arange(self.out) % 3 == 0)
        return self.call(name, _biper.binarize.default, x, threshold, sense)

    def cast(self, x: fx.Node, dtype: torch.dtype, name: str) -> fx.Node:
        return self.call(name, _aten._to_copy.default, x, dtype=dtype)


def assert_bits_agree(came: Tensor, wanted: Tensor, channels: int, share: float) -> None:
    """Allow the few bits whose values lie within rounding of their threshold."""
    a, b = unpack_channels(came, channels), unpack_channels(wanted, channels)
    assert a.shape == b.shape
    assert float((a != b).double().mean()) <= share
