"""What the kernels of a whole network have to do, read off the graph of its engine.

A kernel for each binary convolution, and one for each group of float operators that hang together:
the stem with its BatchNorm, activation, pool and signs, a downsampling shortcut, the classifier.
That is as few as can be without keeping maps on the chip from layer to layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

import torch
from gpu_roofline import Work
from torch import Tensor, fx

from biper_engine import Engine

__all__ = ["Kernel", "kernels"]

_WEIGHT = ".weight"


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel's work for one image; its weights are read once whatever the batch.

    Attributes:
        name: of the layer with the most multiply-accumulates in it.
        map_bytes: of the maps that it reads and writes.
        weight_bytes: of its parameters.
        bit_macs, grouped_bit_macs, float_macs: multiply-accumulates, padded taps counted.
    """

    name: str
    map_bytes: int
    weight_bytes: int
    bit_macs: int = 0
    grouped_bit_macs: int = 0
    float_macs: int = 0

    def work(self, batch: int) -> Work:
        """Return what it does for a batch."""
        return Work(
            nbytes=self.weight_bytes + batch * self.map_bytes,
            bit_macs=batch * self.bit_macs,
            grouped_bit_macs=batch * self.grouped_bit_macs,
            float_macs=batch * self.float_macs,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Sizes(fx.Interpreter):
    """Runs a graph once and keeps the bytes of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.nbytes: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.nbytes[n] = value.numel() * value.element_size()
        return value


def kernels(engine: Engine, images: Tensor) -> list[Kernel]:
    """Return the kernels of an engine in the order in which they run.

    Args:
        engine: on the CPU, takes one tensor.
        images: one image, in the dtype that it takes.
    """
    module = engine.graph_module
    sizes = _Sizes(module)
    with torch.no_grad():
        sizes.run(images)
    macs = {row.name: row.macs for row in engine.report.layers}
    return [_kernel(group, sizes.nbytes, macs) for group in _groups(module.graph)]


def _is_convolution(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith("biper.bconv2d")


def _groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """Return the nodes of each kernel; a result's entries go with the operator."""
    leader: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node in graph.nodes:
        if node.op != "call_function":
            continue
        leader[node] = node
        for source in node.all_input_nodes:
            if source not in leader:
                continue
            entry = "getitem" in str(node.target)
            apart = _is_convolution(node) or _is_convolution(find(source))
            if entry or not apart:
                first, second = find(source), find(node)
                leader[second if first is not second else first] = first
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in leader:
        groups.setdefault(find(node), []).append(node)
    return list(groups.values())


def _kernel(group: list[fx.Node], nbytes: dict[fx.Node, int], macs: dict[str, int]) -> Kernel:
    inside = set(group)
    sources = list(dict.fromkeys(source for node in group for source in node.all_input_nodes))
    parameters = [node for node in sources if node.op == "get_attr"]
    read = [node for node in sources if node.op != "get_attr" and node not in inside]
    written = [node for node in group if any(user not in inside for user in node.users)]
    maps = sum(nbytes[node] * _part_read(node, inside) for node in read if node in nbytes)
    maps += sum(nbytes[node] for node in written if node in nbytes)
    layers = dict(_layers(parameters, macs))
    grouped = any(_is_convolution(node) and node.kwargs.get("groups", 1) != 1 for node in group)
    kind = "float_macs"
    if any(_is_convolution(node) for node in group):
        kind = "grouped_bit_macs" if grouped else "bit_macs"
    return Kernel(
        name=max(layers, key=lambda name: layers[name], default=group[0].name),
        map_bytes=round(maps),
        weight_bytes=sum(nbytes[node] for node in parameters),
        **{kind: sum(layers.values())},
    )


def _part_read(source: fx.Node, inside: set[fx.Node]) -> float:
    """Return how much of a map a kernel needs; 1x1 convolutions of stride 2 skip three quarters."""
    parts = [1.0]
    users = [user for user in source.users if user in inside]
    if users and all(user.target is torch.ops.aten.conv2d.default for user in users):
        parts = [_part_of_stride(user) for user in users]
    return max(parts)


def _part_of_stride(convolution: fx.Node) -> float:
    weight, stride = convolution.args[1], (*convolution.args, None, 1)[3]
    assert isinstance(weight, fx.Node)
    kernel = attrgetter(str(weight.target))(convolution.graph.owning_module)
    steps = stride if isinstance(stride, list | tuple) else (stride, stride)
    covered = (min(1.0, size / step) for size, step in zip(kernel.shape[2:], steps, strict=True))
    return math.prod(covered)


def _layers(parameters: Iterable[fx.Node], macs: dict[str, int]) -> Iterator[tuple[str, int]]:
    for node in parameters:
        name = str(node.target)
        if name.endswith(_WEIGHT) and name.removesuffix(_WEIGHT) in macs:
            yield name.removesuffix(_WEIGHT), macs[name.removesuffix(_WEIGHT)]
