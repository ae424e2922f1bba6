"""Simplify: one spelling for each thing that a captured graph says in several.

Every step keeps the value of every remaining node, with one exception that is the point of this
package: the straight-through form `(a - c) + c`, which differs from `a` by a rounding of the
training trick, becomes `a`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from biper_engine.conversion.graphs import arguments, call, constant, constant_node, is_call, shape, substitute

__all__ = ["simplify"]

aten = torch.ops.aten

_ALIASES = (
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.dropout.default,
)
_ASSERTS = (
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.copy_.default,
)
"""Calls without a result that is used; `copy_` writes a mutated input back, which engines never do."""


def simplify(graph_module: fx.GraphModule) -> None:
    """Rewrite `graph_module` in place; see the module."""
    for rewrite in (
        _drop_asserts,
        _drop_aliases,
        _single_results,
        _masked_writes,
        _layers,
        _reshapes,
        _share_equal_calls,
        _undo_straight_through,
    ):
        rewrite(graph_module)
        graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _calls(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op == "call_function"]


def _drop_asserts(graph_module: fx.GraphModule) -> None:
    for node in reversed(_calls(graph_module)):
        if node.target in _ASSERTS and not node.users:
            graph_module.graph.erase_node(node)


def _drop_aliases(graph_module: fx.GraphModule) -> None:
    for node in _calls(graph_module):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        if is_call(node, aten.copy.default):  # copy(x, value) is value in the place of x
            value = node.args[1]
            if isinstance(value, fx.Node) and _same_value_type(value, node):
                substitute(node, value)
            continue
        same = node.target in _ALIASES
        if node.target == aten._to_copy.default or node.target == aten.to.dtype:
            same = node.meta["val"].dtype == source.meta["val"].dtype
        if same:
            substitute(node, source)


def _single_results(graph_module: fx.GraphModule) -> None:
    """Replace multi-output ops of which only the first output is used."""
    for node in _calls(graph_module):
        if not is_call(node, operator.getitem) or node.args[1] != 0:
            continue
        producer = node.args[0]
        if is_call(producer, aten._native_batch_norm_legit_no_training.default):
            x, weight, bias, mean, var, momentum, eps = producer.args
            args = (x, weight, bias, mean, var, False, momentum, eps, False)
            new = call(graph_module.graph, node, aten.batch_norm.default, *args, like=node)
        elif is_call(producer, aten.native_batch_norm.default) and producer.args[5] is False:
            new = call(graph_module.graph, node, aten.batch_norm.default, *producer.args, False, like=node)
        elif is_call(producer, aten.max_pool2d_with_indices.default):
            new = call(graph_module.graph, node, aten.max_pool2d.default, *producer.args, like=node)
        elif is_call(producer, aten.native_layer_norm.default):
            new = call(graph_module.graph, node, aten.layer_norm.default, *producer.args, like=node)
        else:
            continue
        substitute(node, new)


def _masked_writes(graph_module: fx.GraphModule) -> None:
    """`x[mask] = scalar` becomes `where(mask, scalar, x)`."""
    for node in _calls(graph_module):
        if not is_call(node, aten.index_put.default):
            continue
        named = arguments(node)
        x, indices, values = named["self"], named["indices"], named["values"]
        if len(indices) != 1 or named["accumulate"] or values.meta["val"].numel() != 1:
            continue
        mask = indices[0]
        if mask.meta["val"].dtype != torch.bool or shape(mask) != shape(x):
            continue
        scalar = constant(graph_module, values)
        if scalar is not None:
            values = constant_node(graph_module, node, scalar.reshape(()))
            new = call(graph_module.graph, node, aten.where.self, mask, values, x, like=node)
            substitute(node, new)


def _layers(graph_module: fx.GraphModule) -> None:
    """Convolutions become conv2d, products with a constant matrix become linear."""
    for node in _calls(graph_module):
        if is_call(node, aten.convolution.default):
            x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
            if transposed or len(shape(weight)) != 4:
                continue
            stride, padding, dilation = (
                list(v) * 2 if len(v) == 1 else list(v) for v in (stride, padding, dilation)
            )
            args: tuple[Any, ...] = (x, weight, bias, stride, padding, dilation, groups)
            new = call(graph_module.graph, node, aten.conv2d.default, *args, like=node)
            substitute(node, new)
        elif is_call(node, aten.addmm.default, aten.mm.default):
            _linear(graph_module, node)


def _linear(graph_module: fx.GraphModule, node: fx.Node) -> None:
    named = arguments(node)
    x = named.get("mat1", named.get("self"))
    bias = named["self"] if "mat1" in named else None
    weight = constant(graph_module, named["mat2"])
    if weight is None or any(named.get(name, 1) != 1 for name in ("alpha", "beta")):
        return
    if bias is not None and (constant(graph_module, bias) is None or len(shape(bias)) != 1):
        return
    transposed = constant_node(graph_module, node, weight.t().contiguous())
    substitute(node, call(graph_module.graph, node, aten.linear.default, x, transposed, bias, like=node))


def _reshapes(graph_module: fx.GraphModule) -> None:
    """Every view becomes a reshape with -1 at the one dimension that depends on the batch."""
    spellings = (
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.expand.default,
    )
    for node in _calls(graph_module):
        if not is_call(node, *spellings):
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        target = shape(node)
        sizes = [size if isinstance(size, int) else -1 for size in target]
        if sizes.count(-1) > 1:
            continue
        if _same_shape(source, node):
            substitute(node, source)
        elif is_call(node, aten.expand.default):
            args = (source, sizes)
            substitute(node, call(graph_module.graph, node, aten.expand.default, *args, like=node))
        else:
            args = (source, sizes)
            substitute(node, call(graph_module.graph, node, aten.reshape.default, *args, like=node))


def _same_value_type(a: fx.Node, b: fx.Node) -> bool:
    return _same_shape(a, b) and a.meta["val"].dtype == b.meta["val"].dtype


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return [str(size) for size in shape(a)] == [str(size) for size in shape(b)]


def _share_equal_calls(graph_module: fx.GraphModule) -> None:
    """Let equal calls on equal arguments share one node."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph_module.graph.nodes):
        if node.op not in ("call_function", "get_attr") or "layer" in node.meta:
            continue
        key = (node.op, node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        first = seen.setdefault(key, node)
        if first is not node:
            substitute(node, first)


def _undo_straight_through(graph_module: fx.GraphModule) -> None:
    for node in _calls(graph_module):
        if not is_call(node, aten.add.Tensor) or arguments(node)["alpha"] != 1:
            continue
        for difference, c in (node.args[:2], node.args[1::-1]):
            value = _minuend(difference, c)
            if value is not None and _same_shape(value, node):
                substitute(node, value)
                break


def _minuend(difference: object, c: object) -> fx.Node | None:
    """Return a when `difference` is `a - c`."""
    if not is_call(difference, aten.sub.Tensor):
        return None
    assert isinstance(difference, fx.Node)
    named = arguments(difference)
    matches = named["other"] is c and named["alpha"] == 1
    return named["self"] if matches and isinstance(named["self"], fx.Node) else None


