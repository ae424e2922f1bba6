"""Scales of inputs: a binary value times a number from the input, as `sign(x) * mean|x|`.

If everything that one output sums over has the same scale, the product can be multiplied by it
instead: one number for each sample, for each row of a linear layer, or for each position of a
convolution with a 1x1 kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from biper_engine.conversion.layers import insert
from biper_engine.conversion.operands import Operand, Operands, peel_padding
from biper_engine.conversion.products import Product
from biper_engine.graph.patterns import pair
from biper_engine.graph.reading import arguments, constant, is_call, parent, shape

__all__ = ["Scale", "scaled_operand"]

aten = torch.ops.aten

_SCALES = (aten.mul.Tensor, aten.div.Tensor)


@dataclass(frozen=True)
class Scale:
    """A scale that an input was multiplied by, or divided by.

    Attributes:
        call: the multiplication or division.
        factor: a number, or the scale, of size 1 in every dimension that an output sums over.
    """

    call: fx.Node
    factor: fx.Node | float

    def apply(self, graph_module: fx.GraphModule, before: fx.Node, result: fx.Node) -> fx.Node:
        """Insert the same operation on a result, whose first dimension is that of the scale."""
        return insert(graph_module, before, self.call.target, result, self.factor)  # type: ignore[arg-type]


def scaled_operand(
    graph_module: fx.GraphModule, product: Product, operands: Operands
) -> tuple[Operand, list[Scale]] | str | None:
    """Return the binary input of a layer under its scales, the innermost scale first.

    Returns:
        None if the input is no binary value with scales; the reason, as a clause after "its input",
        if it is one whose scales cannot be pulled out.
    """
    factor = product.factors[0]
    x, scales = factor.node, list[Scale]()
    if product.kind in ("conv1d", "conv2d"):
        _, x = peel_padding(x)
    found: Operand | str = ""
    while isinstance(found, str):
        step = _scale_of(graph_module, x)
        if step is None:
            return None
        x, scale = step
        scales.insert(0, scale)
        found = operands.find(x, factor.axis)
    pulled = [_pulled(graph_module, product, x, scale) for scale in scales]
    known = [scale for scale in pulled if scale is not None]
    if len(known) < len(pulled):
        return (
            "is a sign times a scale that depends on the input and differs among the values that "
            "an output sums up"
        )
    return found, known


def _scale_of(graph_module: fx.GraphModule, x: fx.Node) -> tuple[fx.Node, Scale] | None:
    """Return what a scale is applied to, and the scale."""
    if not is_call(x, *_SCALES):
        return None
    left, right = x.args[:2]
    pairs = ((left, right), (right, left)) if is_call(x, aten.mul.Tensor) else ((left, right),)
    for value, factor in pairs:
        if isinstance(value, fx.Node) and isinstance(factor, int | float):
            return value, Scale(x, factor)
        if not isinstance(value, fx.Node) or not isinstance(factor, fx.Node):
            continue
        if constant(graph_module, value) is not None or constant(graph_module, factor) is not None:
            continue
        sizes = [*shape(factor)]
        smaller = [str(size) for size in sizes] != [str(size) for size in shape(x)]
        if smaller and [str(s) for s in shape(value)] == [str(s) for s in shape(x)]:
            return value, Scale(x, factor)
    return None


def _pulled(
    graph_module: fx.GraphModule, product: Product, x: fx.Node, scale: Scale
) -> Scale | None:
    """Return a scale for the product's result, or None if an output sums over several scales."""
    if not isinstance(scale.factor, fx.Node):
        return scale
    node, rank = product.node, len(shape(x))
    sizes: list[Any] = [1] * (rank - len(shape(scale.factor))) + list(shape(scale.factor))
    if sizes[product.factors[0].axis] != 1:
        return None
    if product.kind == "linear" or all(_is_one(size) for size in sizes[1:]):
        return scale
    named = arguments(node)
    taps = shape(named["weight"])[2:]
    padded = any(pair(named["padding"])) or any(peel_padding(parent(node))[0])
    if product.kind.startswith("conv_transpose") or any(tap != 1 for tap in taps) or padded:
        return None
    factor = scale.factor
    for dim, step in zip((-2, -1), pair(named["stride"]), strict=True):
        if step > 1 and not _is_one(sizes[dim]):
            factor = insert(graph_module, node, aten.slice.Tensor, factor, dim, 0, None, step)
    return Scale(scale.call, factor)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
