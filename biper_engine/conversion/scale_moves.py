"""Scales of samples are multiplied in after moves, not before: `f(x * s)` becomes `f(x) * s`.

`s` has one number for each sample, and `f` reshapes, permutes or pads with zeros within samples, so
the values are the same. After this, the factor next to a layer is its input's scale. A choice
between a number and its negative, `where(c, s, -s)`, becomes a sign times that number.
"""

from __future__ import annotations

import torch
from torch import fx

from biper_engine.conversion.layers import insert
from biper_engine.graph.editing import call, constant_node, repeat_call, substitute
from biper_engine.graph.patterns import zero_pad
from biper_engine.graph.reading import constant, is_call, parent, same_shape, shape

__all__ = ["scale_after_moves"]

aten = torch.ops.aten


def scale_after_moves(graph_module: fx.GraphModule) -> None:
    """Rewrite `graph_module` in place; see the module."""
    for node in list(graph_module.graph.nodes):
        if is_call(node, aten.where.self):
            _signs(graph_module, node)
    for node in list(graph_module.graph.nodes):
        if _keeps_samples(node):
            _scale_later(graph_module, node)


def _keeps_samples(node: fx.Node) -> bool:
    """Whether a call moves values within samples, and adds only zeros."""
    if is_call(node, aten.reshape.default) and shape(node) and shape(parent(node)):
        return str(shape(node)[0]) == str(shape(parent(node))[0])
    if is_call(node, aten.permute.default):
        return list(node.args[1])[:1] == [0]  # type: ignore[arg-type]
    pad = zero_pad(node)
    return pad is not None and len(pad) < 2 * len(shape(node))


def _is_of_samples(factor: object, x: fx.Node, graph_module: fx.GraphModule) -> bool:
    if not isinstance(factor, fx.Node) or constant(graph_module, factor) is not None:
        return False
    sizes = shape(factor)
    same_batch = len(sizes) == len(shape(x)) and str(sizes[0]) == str(shape(x)[0])
    return same_batch and all(str(size) == "1" for size in sizes[1:])


def _scale_later(graph_module: fx.GraphModule, node: fx.Node) -> None:
    scaled = parent(node)
    if not is_call(scaled, aten.mul.Tensor, aten.div.Tensor) or len(scaled.users) > 1:
        return
    left, right = scaled.args[:2]
    if is_call(scaled, aten.mul.Tensor) and _is_of_samples(left, scaled, graph_module):
        left, right = right, left
    if not isinstance(left, fx.Node) or not same_shape(left, scaled):
        return
    if not isinstance(right, fx.Node) or not _is_of_samples(right, scaled, graph_module):
        return
    moved = repeat_call(graph_module.graph, node, node, left)
    moved.meta.pop("source", None)  # a value that the captured graph has not
    ones = [1] * (len(shape(node)) - 1)
    factor = insert(graph_module, node, aten.reshape.default, right, [-1, *ones])
    new = call(graph_module.graph, node, scaled.target, moved, factor, like=node)  # type: ignore[arg-type]
    substitute(node, new)


def _signs(graph_module: fx.GraphModule, node: fx.Node) -> None:
    chosen, first, second = node.args
    if not all(isinstance(operand, fx.Node) for operand in (chosen, first, second)):
        return
    negated = second if is_call(second, aten.neg.default) else first
    number = first if negated is second else second
    assert isinstance(negated, fx.Node)
    if not is_call(negated, aten.neg.default) or parent(negated) is not number:
        return
    if constant(graph_module, number) is not None or same_shape(number, node):
        return
    levels = [1.0, -1.0] if negated is second else [-1.0, 1.0]
    dtype = node.meta["val"].dtype
    held = [constant_node(graph_module, node, torch.tensor(x, dtype=dtype)) for x in levels]
    signs = insert(graph_module, node, aten.where.self, chosen, *held)
    substitute(node, call(graph_module.graph, node, aten.mul.Tensor, signs, number, like=node))
