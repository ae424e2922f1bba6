"""Products with the windows of a map, where both factors depend on the input.

Such a product stands for a convolution whose weights are chosen or mixed for each image. Zeros
around a map of signs are no signs. So the windows are taken of the map between ones, and what the
ones add is subtracted: `a @ windows(x)` becomes `a @ windows(x between ones) - a @ edges`, where
`edges` has a 1 for each place outside of the map. Scales of outputs, `(a * s) @ x`, are multiplied
in afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn.functional import pad, unfold

from biper_engine.conversion.layers import insert
from biper_engine.conversion.operands import Operands
from biper_engine.graph.editing import call, constant_node, substitute
from biper_engine.graph.reading import arguments, constant, is_call, parent, same_shape, shape

__all__ = ["products_with_windows"]

aten = torch.ops.aten


def products_with_windows(graph_module: fx.GraphModule) -> None:
    """Rewrite `graph_module` in place; see the module."""
    for node in list(graph_module.graph.nodes):
        if is_call(node, aten.bmm.default):
            _scale_outputs_later(graph_module, node)
    for node in list(graph_module.graph.nodes):
        if is_call(node, aten.bmm.default):
            _take_ones_for_zeros(graph_module, node)


def _scale_outputs_later(graph_module: fx.GraphModule, node: fx.Node) -> None:
    left = parent(node)
    scaled = parent(left) if is_call(left, aten.reshape.default) else left
    if not is_call(scaled, aten.mul.Tensor) or len(scaled.users) > 1 or len(left.users) > 1:
        return
    signs, scale = (other for other in scaled.args)
    if isinstance(signs, fx.Node) and not same_shape(signs, scaled):
        signs, scale = scale, signs
    if not all(isinstance(other, fx.Node) for other in (signs, scale)):
        return
    assert isinstance(signs, fx.Node)
    assert isinstance(scale, fx.Node)
    if constant(graph_module, scale) is not None or not same_shape(signs, scaled):
        return
    sizes, rows = [str(size) for size in shape(scale)], shape(left)[:2]
    if sizes != [*map(str, rows), *["1"] * (len(shape(scaled)) - 2)] or not _is_int(rows[1]):
        return
    own = signs
    if left is not scaled:
        own = insert(graph_module, node, aten.reshape.default, signs, left.args[1])
    product = insert(graph_module, node, aten.bmm.default, own, node.args[1])
    factor = insert(graph_module, node, aten.reshape.default, scale, [-1, rows[1], 1])
    substitute(node, call(graph_module.graph, node, aten.mul.Tensor, product, factor, like=node))


def _is_int(size: Any) -> bool:
    return isinstance(size, int)


def _take_ones_for_zeros(graph_module: fx.GraphModule, node: fx.Node) -> None:
    left, windows = (parent(node, at) for at in (0, 1))
    if not is_call(windows, aten.im2col.default):
        return
    given = arguments(windows)
    around = [int(edge) for edge in given["padding"]]
    signs = parent(windows)
    sizes = shape(signs)
    if not any(around) or len(sizes) != 4 or not all(map(_is_int, sizes[1:])):
        return
    operands = Operands(graph_module)
    if not _is_sign(operands, signs, 1) or not _is_sign(operands, left, 2):
        return
    edges = [around[1], around[1], around[0], around[0]]
    form = {key: given[key] for key in ("kernel_size", "dilation", "stride")}
    like = left.meta["val"]
    outside = torch.zeros(1, *sizes[1:], dtype=like.dtype, device=like.device)
    outside = pad(outside, edges, value=1.0)
    (outside,) = unfold(outside, form["kernel_size"], form["dilation"], 0, form["stride"])
    ones = insert(graph_module, node, aten.constant_pad_nd.default, signs, edges, 1.0)
    words = (form["kernel_size"], form["dilation"], [0, 0], form["stride"])
    whole = insert(graph_module, node, aten.im2col.default, ones, *words)
    product = insert(graph_module, node, aten.bmm.default, left, whole)
    weight = constant_node(graph_module, node, outside.t().contiguous())
    added = insert(graph_module, node, aten.linear.default, left, weight)
    substitute(node, call(graph_module.graph, node, aten.sub.Tensor, product, added, like=node))


def _is_sign(operands: Operands, x: fx.Node, axis: int) -> bool:
    """Whether a value is -1 or 1."""
    found = operands.find(x, axis)
    return not isinstance(found, str) and [(r.low, r.high) for r in found.rules] == [(-1, 1)]
