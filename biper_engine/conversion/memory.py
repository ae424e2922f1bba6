"""Operators that read the memory of a tensor, not only its values.

If such an operator reads a map, the map must have the memory layout that it has in the model, even
if the engine prefers another layout. So a clone with that layout is inserted before the operator.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from biper_engine.errors import ConversionError
from biper_engine.graph.reading import arguments, constant, is_call

__all__ = ["fill_empty_memory", "fix_layouts", "is_read_as_memory"]

aten = torch.ops.aten

_STRIDED = (
    aten.as_strided.default,
    aten.as_strided_copy.default,
    aten.as_strided_scatter.default,
)
_CONTIGUOUS = (
    aten.view.dtype,
    aten.view_copy.dtype,
    aten.view_as_complex.default,
    aten.view_as_complex_copy.default,
)
_RECURRENT = tuple(
    getattr(aten, name).default
    for name in ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")
    if hasattr(aten, name)
)
_NAMESPACES = ("aten", "prims", "biper")
_EMPTY = {
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_permuted.default: aten.zeros.default,
    aten.empty_strided.default: aten.zeros.default,
    aten.new_empty.default: aten.new_zeros.default,
    aten.new_empty_strided.default: aten.new_zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
}
"""Operators with undefined values, and operators that make values of the same form; the sizes are
the first argument of each."""


def fix_layouts(graph_module: fx.GraphModule) -> None:
    """Give each operator that reads memory a clone of its input, in the layout of the trace.

    Raises:
        ConversionError: `as_strided` reads a view, whose memory also has other values.
    """
    for node in list(graph_module.graph.nodes):
        if not _reads_memory(node):
            continue
        for source in node.all_input_nodes:
            value = source.meta.get("val")
            if not isinstance(value, Tensor) or value.dim() == 0 or _stays(graph_module, source):
                continue
            ordered = source
            if is_call(node, *_STRIDED) and source is node.args[0]:
                ordered = _in_order(graph_module, node, source)
            layout = _layout(node, value)
            if layout is None:
                continue
            with graph_module.graph.inserting_before(node):
                clone = graph_module.graph.call_function(
                    aten.clone.default, (ordered,), {"memory_format": layout}
                )
            clone.meta = {"val": ordered.meta["val"].clone(memory_format=layout)}
            node.replace_input_with(source, clone)


def _stays(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a contiguous constant; only possible maps get another layout."""
    held = constant(graph_module, node)
    return held is not None and held.dim() < 4 and held.is_contiguous()


def is_read_as_memory(node: fx.Node) -> bool:
    """Whether an operator reads the memory of this node's value."""
    return any(_reads_memory(user) for user in node.users)


def _reads_memory(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    if node.target.namespace not in _NAMESPACES:
        return True
    return is_call(node, *_STRIDED, *_CONTIGUOUS, *_RECURRENT)


def _layout(node: fx.Node, value: Tensor) -> torch.memory_format | None:
    """Return the layout that the operator needs; None if the value's layout has no name."""
    if is_call(node, *_STRIDED, *_CONTIGUOUS, *_RECURRENT) or value.is_contiguous():
        return torch.contiguous_format
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def _in_order(graph_module: fx.GraphModule, node: fx.Node, source: fx.Node) -> fx.Node:
    """Return the tensor that `as_strided` reads, with dimensions in the order of its memory."""
    value: Tensor = source.meta["val"]
    strides = [_number(stride) for stride in value.stride()]
    order = sorted(range(value.dim()), key=lambda axis: -strides[axis])
    permuted = value.permute(order)
    whole = permuted.is_contiguous() and _number(value.storage_offset()) == 0
    if not whole or _reach(node) > math.prod(map(_number, value.shape)):
        _refuse(node)
    if order == sorted(order):
        return source
    if not is_call(node, aten.as_strided.default, aten.as_strided_copy.default):
        _refuse(node)
    with graph_module.graph.inserting_before(node):
        ordered = graph_module.graph.call_function(aten.permute.default, (source, order))
    ordered.meta = {"val": permuted}
    return ordered


def _reach(node: fx.Node) -> int:
    """Return the number of values, from the start of a tensor, that `as_strided` may read."""
    named = arguments(node)
    steps = zip(map(_number, named["size"]), map(_number, named["stride"]), strict=True)
    return (
        _number(named["storage_offset"] or 0) + 1 + sum((size - 1) * step for size, step in steps)
    )


def _refuse(node: fx.Node) -> None:
    raise ConversionError(
        f"`{node.target}` reads the memory around a view, which an engine does not keep: call "
        "`.contiguous()` on the tensor before it, or use `unfold`, slices and `reshape` instead."
    )


def _number(size: Any) -> int:
    """Return a size of the example, without a guard on it."""
    if isinstance(size, fx.Node):
        size = size.meta["val"]
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def fill_empty_memory(graph_module: fx.GraphModule) -> None:
    """Fill memory that a model allocates with zeros, so that unwritten values are defined."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target in _EMPTY:
            kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
            with graph_module.graph.inserting_before(node):
                new = graph_module.graph.call_function(_EMPTY[node.target], node.args[:1], kwargs)
            if is_call(node, aten.new_empty.default, aten.new_empty_strided.default):
                new.args = node.args[:2]
            new.meta = dict(node.meta)
            new.meta.pop("source", None)  # the captured graph's value is undefined
            node.replace_all_uses_with(new)
            graph_module.graph.erase_node(node)
