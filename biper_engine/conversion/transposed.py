"""Transposed convolutions as one convolution for each phase of the output, then interleaved.

Along one axis, input position i and tap k reach output position `i * stride - padding + k *
dilation`. Output positions with the same remainder by the stride are a phase. All of a phase use
the same taps, whose inputs are evenly spaced: a convolution of stride 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from biper_engine.conversion.layers import insert
from biper_engine.conversion.packing import Layer
from biper_engine.conversion.weights import BinaryWeight
from biper_engine.geometry import Conv2dGeometry
from biper_engine.graph.editing import constant_node

__all__ = ["TransposedAxis", "interleaved"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Phase:
    """The convolution of one phase along one axis.

    Attributes:
        taps: indices of the kernel, in the order of the convolution's.
        dilation: of the convolution.
        before: padding before the input.
        after: padding after it.
        skipped: leading positions of the convolution that are no output.
        count: number of output positions.
    """

    taps: tuple[int, ...]
    dilation: int
    before: int
    after: int
    skipped: int
    count: int


@dataclass(frozen=True)
class TransposedAxis:
    """A transposed convolution along one axis: its size and its output's, and its arguments."""

    size: int
    output: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    def phases(self) -> list[Phase]:
        """Return one phase for each remainder; a phase may have no taps."""
        return [self._phase(first) for first in range(self.stride)]

    def _phase(self, first: int) -> Phase:
        count = max(0, -(-(self.output - first) // self.stride))
        reached = {
            tap: (first + self.padding - tap * self.dilation) // self.stride
            for tap in range(self.kernel)
            if (first + self.padding - tap * self.dilation) % self.stride == 0
        }
        taps = tuple(sorted(reached, key=reached.__getitem__))
        if not taps or not count:
            return Phase((), 1, 0, 0, 0, count)
        low, high = reached[taps[0]], reached[taps[-1]]
        dilation = reached[taps[1]] - low if len(taps) > 1 else 1
        before = max(0, -low)
        after = max(0, count - 1 + high - (self.size - 1))
        return Phase(taps, dilation, before, after, low + before, count)


def interleaved(
    layer: Layer,
    axes: tuple[TransposedAxis, TransposedAxis],
    weight: BinaryWeight,
    groups: int,
    bias: Tensor | None,
) -> fx.Node:
    """Insert the convolutions of all phases; return the whole map.

    Args:
        layer: the layer; its value is a map [N, C, H, W].
        axes: vertical and horizontal.
        weight: [O, C / groups, KH, KW].
        groups: groups of channels.
        bias: [O], or None.
    """
    graph_module, node = layer.graph_module, layer.node
    vertical, horizontal = (axis.phases() for axis in axes)
    rows, columns = (max(phase.count for phase in phases) for phases in (vertical, horizontal))
    maps = [
        _phase_map(layer, (down, across), weight, groups, bias, (rows, columns))
        for down in vertical
        for across in horizontal
    ]
    outputs = weight.positive.shape[0]
    strides = axes[0].stride, axes[1].stride
    if len(maps) == 1:
        return maps[0]
    stacked = insert(graph_module, node, aten.stack.default, maps, 2)
    sizes = [-1, outputs, *strides, rows, columns]
    apart = insert(graph_module, node, aten.reshape.default, stacked, sizes)
    turned = insert(graph_module, node, aten.permute.default, apart, [0, 1, 4, 2, 5, 3])
    sizes = [-1, outputs, rows * strides[0], columns * strides[1]]
    whole = insert(graph_module, node, aten.reshape.default, turned, sizes)
    return _cropped(layer, whole, (0, axes[0].output), (0, axes[1].output))


def _phase_map(
    layer: Layer,
    phases: tuple[Phase, Phase],
    weight: BinaryWeight,
    groups: int,
    bias: Tensor | None,
    size: tuple[int, int],
) -> fx.Node:
    """Return the map of one phase in each direction; it has `size`, the largest of all phases."""
    down, across = phases
    outputs, group_channels = weight.positive.shape[:2]
    if not down.taps or not across.taps:
        return _constant_map(layer, outputs, bias, size)
    geometry = Conv2dGeometry(
        in_channels=group_channels * groups,
        out_channels=outputs,
        kernel_size=(len(down.taps), len(across.taps)),
        padding=(
            *(down.before, down.after + size[0] - down.count),
            *(across.before, across.after + size[1] - across.count),
        ),
        dilation=(down.dilation, across.dilation),
        groups=groups,
    )
    result = layer.convolved(geometry, weight.part(down.taps, across.taps), bias)
    return _cropped(
        layer,
        result,
        (down.skipped, down.skipped + size[0]),
        (across.skipped, across.skipped + size[1]),
    )


def _constant_map(
    layer: Layer, outputs: int, bias: Tensor | None, size: tuple[int, int]
) -> fx.Node:
    """Return the map of a phase that no input reaches, with the batch of the layer's input."""
    value, graph_module, node = layer.operand.value, layer.graph_module, layer.node
    one = insert(graph_module, node, aten.slice.Tensor, value, 1, 0, 1)
    one = insert(graph_module, node, aten.slice.Tensor, one, 2, 0, 1)
    one = insert(graph_module, node, aten.slice.Tensor, one, 3, 0, 1)
    zeros = insert(graph_module, node, aten.zeros_like.default, one)
    zeros = insert(graph_module, node, aten.expand.default, zeros, [-1, outputs, *size])
    if bias is None:
        return zeros
    held = constant_node(graph_module, node, bias.reshape(1, -1, 1, 1))
    return insert(graph_module, node, aten.add.Tensor, zeros, held)


def _cropped(layer: Layer, x: fx.Node, rows: tuple[int, int], columns: tuple[int, int]) -> fx.Node:
    for dim, (start, end) in ((2, rows), (3, columns)):
        whole = int(x.meta["val"].shape[dim])
        if (start, end) != (0, whole):
            x = insert(layer.graph_module, layer.node, aten.slice.Tensor, x, dim, start, end)
    return x
