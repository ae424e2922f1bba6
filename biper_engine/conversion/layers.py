"""Layers: products with a constant become convolutions of maps and linear layers.

One-dimensional convolutions become convolutions of maps of height 1, products of patches
(`F.unfold`) with a matrix become convolutions, and matrix products with a constant become linear
layers, on whichever side it is. Products of several matrices with a part of the features each, as
the heads of a layer have, become grouped convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor

from biper_engine.conversion.chains import shorten_chains
from biper_engine.graph.editing import call, constant_node, substitute
from biper_engine.graph.patterns import pair
from biper_engine.graph.reading import arguments, constant, evaluate, is_call, parent, shape

__all__ = ["as_layers", "insert"]

aten = torch.ops.aten


def as_layers(graph_module: fx.GraphModule) -> None:
    """Rewrite `graph_module` in place; see the module."""
    for node in list(graph_module.graph.nodes):
        rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
        if rewrite is not None:
            rewrite(graph_module, node)
    shorten_chains(graph_module)
    for node in list(graph_module.graph.nodes):
        if is_call(node, aten.linear.default) and not _patches(graph_module, node):
            _rows_of_a_later_batch(graph_module, node)
            _rows(graph_module, node)
    for node in list(graph_module.graph.nodes):
        if is_call(node, aten.linear.default):
            _batch_to_front(graph_module, node)
    shorten_chains(graph_module)


def insert(
    graph_module: fx.GraphModule, before: fx.Node, target: Callable[..., Any], *args: Any
) -> fx.Node:
    """Insert a call before a node, for a value that the captured graph has not."""
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.call_function(target, args)
    values = {held: held.meta["val"] for held in node.all_input_nodes}
    fake = next(value for value in values.values() if isinstance(value, FakeTensor))
    with enable_python_dispatcher(), fake.fake_mode:
        node.meta["val"] = evaluate(node, values)
    return node


def _reshaped(
    graph_module: fx.GraphModule, before: fx.Node, x: fx.Node, *sizes: int | torch.SymInt
) -> fx.Node:
    """Insert a reshape; at most one size depends on the batch."""
    target = [size if isinstance(size, int) else -1 for size in sizes]
    return insert(graph_module, before, aten.reshape.default, x, target)


def _replace(graph_module: fx.GraphModule, node: fx.Node, value: fx.Node) -> None:
    """Replace a node by another with its value, in its shape."""
    target = [size if isinstance(size, int) else -1 for size in shape(node)]
    new = call(graph_module.graph, node, aten.reshape.default, value, target, like=node)
    new.meta.pop("layer", None)
    substitute(node, new)


def _named_after(node: fx.Node, layer: fx.Node) -> fx.Node:
    if "layer" in node.meta:
        layer.meta["layer"] = node.meta["layer"]
    return layer


# -- convolutions ---------------------------------------------------------------------------------


def _convolution(graph_module: fx.GraphModule, node: fx.Node) -> None:
    named = arguments(node)
    weight = named["weight"]
    rank = len(shape(weight))
    if rank == 4 and not named["transposed"]:
        sizes = [list(pair(named[name])) for name in ("stride", "padding", "dilation")]
        args = (named["input"], weight, named["bias"], *sizes, named["groups"])
        substitute(node, call(graph_module.graph, node, aten.conv2d.default, *args, like=node))
    elif rank == 3 and constant(graph_module, weight) is not None:
        _one_dimensional(graph_module, node, named)


def _one_dimensional(graph_module: fx.GraphModule, node: fx.Node, named: dict[str, Any]) -> None:
    held = constant(graph_module, named["weight"])
    assert held is not None
    images, channels, length = shape(named["input"])
    x = _reshaped(graph_module, node, named["input"], images, channels, 1, length)
    wide = constant_node(graph_module, node, held.unsqueeze(2))
    stride, padding, dilation = (named[name][0] for name in ("stride", "padding", "dilation"))
    args = (x, wide, named["bias"], [1, stride], [0, padding], [1, dilation])
    if named["transposed"]:
        more = (True, [0, named["output_padding"][0]], named["groups"])
        conv = insert(graph_module, node, aten.convolution.default, *args, *more)
    else:
        conv = insert(graph_module, node, aten.conv2d.default, *args, named["groups"])
    conv.meta["written_as"] = "conv_transpose1d" if named["transposed"] else "conv1d"
    _named_after(node, conv)
    _replace(graph_module, node, conv)


def _patches(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Turn a linear layer on the columns of `F.unfold` into a convolution, if it is one."""
    named = arguments(node)
    turned = _before_rows(parent(node)) or parent(node)
    weight = constant(graph_module, named["weight"])
    if weight is None or not is_call(turned, aten.permute.default):
        return False
    columns = parent(turned)
    if list(turned.args[1]) != [0, 2, 1] or not is_call(columns, aten.im2col.default):  # type: ignore[arg-type]
        return False
    if len(shape(parent(columns))) != 4:
        return False
    window = arguments(columns)
    kernel = window["kernel_size"]
    held = constant_node(graph_module, node, weight.reshape(weight.shape[0], -1, *kernel))
    sizes = (window["stride"], window["padding"], window["dilation"])
    args = (parent(columns), held, named["bias"], *sizes, 1)
    conv = _named_after(node, insert(graph_module, node, aten.conv2d.default, *args))
    flat = _reshaped(graph_module, node, conv, *shape(conv)[:2], shape(columns)[2])
    _replace(graph_module, node, insert(graph_module, node, aten.permute.default, flat, [0, 2, 1]))
    return True


def _before_rows(x: fx.Node) -> fx.Node | None:
    """Return the value that a reshape makes rows of, or None if it is no such reshape."""
    if not is_call(x, aten.reshape.default):
        return None
    whole = parent(x)
    return whole if len(shape(whole)) > 2 and shape(whole)[-1] == shape(x)[-1] else None


def _rows(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Let a linear layer read a value itself, whose rows are reshaped for it."""
    named = arguments(node)
    whole = _before_rows(parent(node))
    sizes = () if whole is None else shape(whole)
    if whole is None or isinstance(sizes[-1], torch.SymInt):
        return
    args = (whole, named["weight"], named["bias"])
    layer = insert(graph_module, node, aten.linear.default, *args)
    _replace(graph_module, node, _named_after(node, layer))


def _rows_of_a_later_batch(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Keep the dimensions [T, N] apart that are joined to rows for a linear layer alone."""
    rows, users = parent(node), list(node.users)
    apart = users[0] if len(users) == 1 and is_call(users[0], aten.reshape.default) else None
    if apart is None or not is_call(rows, aten.reshape.default):
        return
    *front, outputs = shape(apart)
    if len(shape(rows)) != 2 or outputs != shape(node)[-1]:
        return
    if not front or not isinstance(front[0], int):
        return
    if all(isinstance(size, int) for size in front) or isinstance(shape(rows)[1], torch.SymInt):
        return
    x = _reshaped(graph_module, node, parent(rows), *front, shape(rows)[1])
    joined = _reshaped(graph_module, node, x, *shape(rows))
    node.replace_input_with(rows, joined)


def _batch_to_front(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Let a linear layer on tokens [T, N, C] read [N, T, C], as binary layers do."""
    named = arguments(node)
    sizes = shape(named["input"])
    symbols = [dim for dim, size in enumerate(sizes) if not isinstance(size, int)]
    if len(symbols) != 1 or symbols[0] in (0, len(sizes) - 1):
        return
    (batch,) = symbols
    order = [batch, *(dim for dim in range(len(sizes)) if dim != batch)]
    x = insert(graph_module, node, aten.permute.default, named["input"], order)
    layer = insert(graph_module, node, aten.linear.default, x, named["weight"], named["bias"])
    turned = [order.index(dim) for dim in range(len(sizes))]
    back = call(
        graph_module.graph, node, aten.permute.default, _named_after(node, layer), turned, like=node
    )
    back.meta.pop("layer", None)
    substitute(node, back)


# -- matrix products ------------------------------------------------------------------------------


def _held(graph_module: fx.GraphModule, matrix: fx.Node) -> Tensor | None:
    """Return the matrix that a value repeats for each sample, or the matrices for each head."""
    origin = matrix
    while is_call(origin, aten.expand.default, aten.reshape.default):
        inner = parent(origin)
        if is_call(origin, aten.expand.default) and not _repeats_whole(shape(inner), shape(origin)):
            return None
        origin = inner
    held = constant(graph_module, origin)
    if held is None or tuple(held.shape[-2:]) != tuple(shape(matrix)[-2:]):
        return None
    first = held.reshape(-1, *held.shape[-2:])[0]
    # Repeated for a dimension whose size is known, as for the tokens of [T, N, C].
    return first if torch.equal(held, first.expand_as(held)) else held


def _repeats_whole(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Whether an expand only adds dimensions in front of all that have more than one value."""
    padded = [1] * (len(after) - len(before)) + list(before)
    own = [dim for dim, size in enumerate(padded) if str(size) != "1"]
    repeated = [dim for dim, size in enumerate(after) if dim not in own and str(size) != "1"]
    return not repeated or not own or max(repeated) < min(own)


def _linear(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """`mm` and `addmm` with a constant on the right, or `mm` with one on the left."""
    named = arguments(node)
    x = named.get("mat1", named.get("self"))
    bias = named["self"] if "mat1" in named else None
    weight = constant(graph_module, named["mat2"])
    if weight is None:
        left = constant(graph_module, x)
        if left is not None and bias is None:
            _from_the_left(graph_module, node, named["mat2"], left)
        return
    offset = None if bias is None else constant(graph_module, bias)
    if bias is not None and (offset is None or offset.dim() != 1):
        return
    alpha, beta = named.get("alpha", 1), named.get("beta", 1)
    turned = constant_node(graph_module, node, (weight * alpha).t().contiguous())
    if bias is not None and offset is not None and beta != 1:
        bias = constant_node(graph_module, node, offset * beta)
    substitute(
        node, call(graph_module.graph, node, aten.linear.default, x, turned, bias, like=node)
    )


def _from_the_left(graph_module: fx.GraphModule, node: fx.Node, x: fx.Node, weight: Tensor) -> None:
    """`w @ x` is the linear layer of the columns of x."""
    order = [*range(len(shape(x)) - 2), len(shape(x)) - 1, len(shape(x)) - 2]
    turned = insert(graph_module, node, aten.permute.default, x, order)
    held = constant_node(graph_module, node, weight.reshape(weight.shape[-2:]).contiguous())
    layer = insert(graph_module, node, aten.linear.default, turned, held, None)
    _named_after(node, layer)
    new = call(graph_module.graph, node, aten.permute.default, layer, order, like=node)
    new.meta.pop("layer", None)
    substitute(node, new)


def _vector(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """`mv` with a constant vector is a linear layer with one output."""
    named = arguments(node)
    weight = constant(graph_module, named["vec"])
    if weight is None:
        return
    held = constant_node(graph_module, node, weight[None])
    layer = insert(graph_module, node, aten.linear.default, named["self"], held, None)
    _replace(graph_module, node, _named_after(node, layer))


def _batched(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """`bmm` with one constant matrix for all samples, or with one for each head."""
    named = arguments(node)
    left, right = named["self"], named["mat2"]
    weight = _held(graph_module, right)
    if weight is None:
        weight = _held(graph_module, left)
        if weight is not None and weight.numel() == math.prod(weight.shape[-2:]):
            _from_the_left(graph_module, node, right, weight)
        return
    if weight.numel() > math.prod(weight.shape[-2:]):
        _heads(graph_module, node, left, weight)
        return
    held = constant_node(graph_module, node, weight.reshape(weight.shape[-2:]).t().contiguous())
    layer = call(graph_module.graph, node, aten.linear.default, left, held, None, like=node)
    substitute(node, layer)


def _heads(graph_module: fx.GraphModule, node: fx.Node, x: fx.Node, weight: Tensor) -> None:
    """A product [B, M, K] by [H, K, O], repeated over the batch, is a grouped convolution."""
    heads, inputs, outputs = weight.reshape(-1, *weight.shape[-2:]).shape
    batch, rows, _ = shape(x)
    first = isinstance(batch, int)  # the heads are the first dimension, and the batch a later one
    if (first and batch != heads) or not (first or isinstance(rows, int)):
        return
    order = [0, 2, 1, 3]
    per_head = [1, heads, -1, inputs] if first else [-1, heads, rows, inputs]
    x = insert(graph_module, node, aten.reshape.default, x, per_head)
    x = insert(graph_module, node, aten.permute.default, x, order)
    x = insert(graph_module, node, aten.reshape.default, x, [-1, heads * inputs, 1, 1])
    matrix = weight.reshape(heads, inputs, outputs).transpose(1, 2).reshape(-1, inputs, 1, 1)
    held = constant_node(graph_module, node, matrix.contiguous())
    args = (x, held, None, [1, 1], [0, 0], [1, 1], heads)
    conv = _named_after(node, insert(graph_module, node, aten.conv2d.default, *args))
    per_row = [1, -1, heads, outputs] if first else [-1, rows, heads, outputs]
    y = insert(graph_module, node, aten.reshape.default, conv, per_row)
    _replace(graph_module, node, insert(graph_module, node, aten.permute.default, y, order))


_REWRITES: dict[Any, Callable[[fx.GraphModule, fx.Node], None]] = {
    aten.convolution.default: _convolution,
    aten.mm.default: _linear,
    aten.addmm.default: _linear,
    aten.mv.default: _vector,
    aten.bmm.default: _batched,
}
