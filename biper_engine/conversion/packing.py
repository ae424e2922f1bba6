"""Packing: a convolution of a value of few levels with a weight of few values, on bits.

Every binary value of which the activation is the sum is convolved with every term of the weight.
With activations `sum of sx * (+-1) + mx` and a weight of terms `sw * (+-1)`,

    conv(x, w) = sum over both of sx * sw * dot  +  mx * (sum of weights over the valid taps).

A term with one sign everywhere needs no convolution of its own: the sum of a window's input is one
of the sums of the epilogue, and so is that of the weights at its valid taps.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from biper_engine.conversion import ir
from biper_engine.conversion.ir import BinaryConv, StepRule
from biper_engine.conversion.operands import Operand
from biper_engine.conversion.weights import BinaryWeight, WeightTerm
from biper_engine.geometry import Conv2dGeometry
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
        terms = [term for term in weight.all_terms() if term.same is None]
        ones = [term.same for term in weight.all_terms() if term.same is not None]
        if not terms:
            terms, ones = weight.all_terms()[:1], ones[1:]
        result = None
        offset = ir.float64(0.0 if bias is None else bias, geometry.out_channels)
        pairs = itertools.product(zip(self.operand.rules, self.bits, strict=True), terms)
        for number, ((rule, bits), term) in enumerate(pairs):
            half = (rule.high - rule.low) / 2
            factors: dict[str, Tensor] = {"multiplier": term.scale * half, "bias": offset}
            if ones and term is terms[0]:
                factors["window"] = ones[0] * half
            if number < len(terms):
                factors |= self._middle(geometry, offset, term, [] if number else ones)
            part = self._emit(bits, self._conv(geometry, rule, term, factors, number))
            result = part if result is None else self._sum(result, part)
            offset = torch.zeros_like(offset)
        assert result is not None
        return result

    def _middle(
        self, geometry: Conv2dGeometry, bias: Tensor, term: WeightTerm, ones: list[Tensor]
    ) -> dict[str, Tensor]:
        """Return what the offset of the input adds, to the bias if every window sees it whole."""
        middle = self.operand.offset
        if not middle:
            return {}
        if any(geometry.padding):
            valid = {"valid": ones[0] * middle} if ones else {}
            return {"taps": term.scale * middle, **valid}
        total = term.weight().sum((1, 2, 3)) + sum(scale * geometry.reduction for scale in ones)
        return {"bias": bias + total * middle}

    def _conv(
        self,
        geometry: Conv2dGeometry,
        rule: StepRule,
        term: WeightTerm,
        factors: dict[str, Tensor],
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
            epilogue=Epilogue(**factors),  # type: ignore[arg-type]
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


_ORDINALS = ("first", "second", "third", "other")
