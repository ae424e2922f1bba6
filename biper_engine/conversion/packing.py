"""Packing: a convolution of a value of few levels with a weight of few values, on bits.

Every binary value of which the activation is the sum is convolved with every term of the weight.
With activations `sum of sx * (+-1) + mx` and a weight of terms `sw * (+-1)`,

    conv(x, w) = sum over both of sx * sw * dot  +  mx * (sum of weights over the valid taps).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from biper_engine.conversion import ir
from biper_engine.conversion.ir import BinaryConv, StepRule
from biper_engine.conversion.operands import Operand
from biper_engine.conversion.weights import BinaryWeight, WeightTerm
from biper_engine.geometry import Conv2dGeometry
from biper_engine.graph.editing import constant_node
from biper_engine.ops.epilogue import Epilogue

__all__ = ["Layer"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """A layer to be packed.

    Attributes:
        graph_module: the graph.
        node: the layer; calls are inserted before it.
        operand: its input.
        bits: the packed maps of the input, one for each of its rules.
    """

    graph_module: fx.GraphModule
    node: fx.Node
    operand: Operand
    bits: list[fx.Node]

    def convolved(
        self, geometry: Conv2dGeometry, weight: BinaryWeight, bias: Tensor | None
    ) -> fx.Node:
        """Insert the convolution with a weight [O, C / groups, KH, KW]; return its map."""
        channels = geometry.out_channels
        offset = ir.float64(0.0 if bias is None else bias, channels)
        sums = self._sums(geometry, weight)
        uniform = sums is not None and bool((sums == sums[..., :1, :1]).all())
        if sums is not None and uniform:
            offset = offset + sums[0, :, 0, 0]
        result = None
        pairs = itertools.product(
            zip(self.operand.rules, self.bits, strict=True), weight.all_terms()
        )
        for number, ((rule, bits), term) in enumerate(pairs):
            conv = self._conv(geometry, rule, term, offset, number)
            part = self._emit(bits, conv)
            result = part if result is None else self._sum(result, part)
            offset = torch.zeros_like(offset)
        assert result is not None
        if sums is not None and not uniform:
            held = constant_node(self.graph_module, self.node, sums.float())
            result = self._sum(result, held)
        return result

    def _conv(
        self,
        geometry: Conv2dGeometry,
        rule: StepRule,
        term: WeightTerm,
        offset: Tensor,
        number: int,
    ) -> BinaryConv:
        value = self.operand.value
        layer = str(self.node.meta.get("layer") or self.node.name)
        return BinaryConv(
            layer=layer if number == 0 else f"{layer}.{_ORDINALS[min(number, 3)]}",
            value=value.meta.get("source", value.name),
            source=self.operand.source,
            float_conv=self.node.meta.get("source", self.node.name),
            rule=rule,
            geometry=geometry,
            positive=term.positive,
            epilogue=Epilogue(multiplier=term.scale * (rule.high - rule.low) / 2, bias=offset),
            rows=not self._is_map,
        )

    def _emit(self, bits: fx.Node, conv: BinaryConv) -> fx.Node:
        with self.graph_module.graph.inserting_before(self.node):
            result = self.graph_module.graph.call_function(ir.binary_conv, (bits,))
        images, _, *size = self._map().shape
        output = (images, conv.geometry.out_channels, *conv.geometry.output_size(*map(int, size)))
        result.meta = {"conv": conv, "layer": conv.layer, "val": self._map().new_empty(output)}
        return result

    def _map(self) -> Tensor:
        """Return the fake value of the input as a map [N, C, H, W]."""
        value: Tensor = self.operand.value.meta["val"]
        return value if self._is_map else value.reshape(-1, value.shape[-1], 1, 1)

    @property
    def _is_map(self) -> bool:
        return self.operand.value.meta["val"].dim() == 4 and self.operand.axis == 1

    def _sum(self, a: fx.Node, b: fx.Node) -> fx.Node:
        with self.graph_module.graph.inserting_before(self.node):
            node = self.graph_module.graph.call_function(aten.add.Tensor, (a, b))
        node.meta = {"val": a.meta["val"]}
        return node

    def _sums(self, geometry: Conv2dGeometry, weight: BinaryWeight) -> Tensor | None:
        """Return the offset times the weights of the valid taps, float64 [1, O, OH, OW]."""
        if not self.operand.offset:
            return None
        top, bottom, left, right = geometry.padding
        height, width = (int(size) for size in self._map().shape[2:])
        ones = torch.ones(1, geometry.in_channels, height, width, dtype=torch.float64)
        padded = F.pad(ones, (left, right, top, bottom))
        shared = (None, geometry.stride, 0, geometry.dilation, geometry.groups)
        return F.conv2d(padded, weight.weight(), *shared) * self.operand.offset


_ORDINALS = ("first", "second", "third", "other")
