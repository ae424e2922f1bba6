"""Simplify: one form for each computation that a captured graph can write in several.

Every step keeps the value of every remaining node, with one intended exception: the
straight-through form `(a - c) + c`, which differs from `a` by a rounding error of the training
trick, becomes `a`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from biper_engine.conversion.chains import shorten_chains
from biper_engine.conversion.gathers import index_written_maps
from biper_engine.conversion.layers import as_layers
from biper_engine.conversion.memory import fill_empty_memory, fix_layouts, is_read_as_memory
from biper_engine.conversion.scale_moves import scale_after_moves
from biper_engine.conversion.windows import products_with_windows
from biper_engine.graph.editing import call, constant_node, repeat_call, substitute
from biper_engine.graph.patterns import clamp_limits
from biper_engine.graph.reading import arguments, constant, is_call, parent, same_shape, shape

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
"""Calls whose result is not used; `copy_` writes a mutated input back, which engines never do."""


_BROADCASTING = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)


def simplify(graph_module: fx.GraphModule) -> None:
    """Rewrite `graph_module` in place; see the module."""
    for rewrite in (
        _drop_asserts,
        fill_empty_memory,
        fix_layouts,
        _drop_aliases,
        _single_results,
        _masked_writes,
        index_written_maps,
        _reshapes,
        shorten_chains,
        as_layers,
        shorten_chains,
        _share_equal_calls,
        _undo_straight_through,
        _pads_behind,
        _reversed_differences,
        _broadcast_operands,
        scale_after_moves,
        products_with_windows,
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
        if is_call(node, aten.copy.default):  # copy(x, value) is value in place of x
            value = node.args[1]
            if isinstance(value, fx.Node) and _same_value_type(value, node):
                substitute(node, value)
            continue
        same = node.target in _ALIASES or _keeps_order(node)
        same = same and not is_read_as_memory(node)
        if node.target == aten._to_copy.default or node.target == aten.to.dtype:
            same = node.meta["val"].dtype == source.meta["val"].dtype
            same = same and not is_read_as_memory(node)
        if same:
            substitute(node, source)


def _keeps_order(node: fx.Node) -> bool:
    """Whether a node permutes dimensions into the order that they have, as `einsum` does."""
    if not is_call(node, aten.permute.default):
        return False
    rank = len(shape(node))
    return [dim % rank for dim in _integers(node.args[1])] == list(range(rank))  # type: ignore[arg-type]


def _single_results(graph_module: fx.GraphModule) -> None:
    """Replace multi-output ops if only the first output is used."""
    for node in _calls(graph_module):
        if not is_call(node, operator.getitem) or node.args[1] != 0:
            continue
        producer = parent(node)
        if is_call(producer, aten._native_batch_norm_legit_no_training.default):
            x, weight, bias, mean, var, momentum, eps = producer.args
            args = (x, weight, bias, mean, var, False, momentum, eps, False)
            new = call(graph_module.graph, node, aten.batch_norm.default, *args, like=node)
        elif is_call(producer, aten.native_batch_norm.default) and producer.args[5] is False:
            new = call(
                graph_module.graph, node, aten.batch_norm.default, *producer.args, False, like=node
            )
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


def _reshapes(graph_module: fx.GraphModule) -> None:
    """Every view becomes a reshape with -1 in the one dimension that depends on the batch."""
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
    _transposes(graph_module)
    for node in _calls(graph_module):
        if not is_call(node, *spellings):
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        target = shape(node)
        sizes = [size if isinstance(size, int) else -1 for size in target]
        if sizes.count(-1) > 1:
            continue
        if same_shape(source, node):
            substitute(node, source)
        elif not is_call(node, aten.expand.default):
            args = (source, sizes)
            substitute(node, call(graph_module.graph, node, aten.reshape.default, *args, like=node))
        elif _keeps_batch(source, node):
            args = (source, sizes)
            substitute(node, call(graph_module.graph, node, aten.expand.default, *args, like=node))


def _transposes(graph_module: fx.GraphModule) -> None:
    for node in _calls(graph_module):
        if is_call(node, aten.transpose.int, aten.t.default):
            order = list(range(len(shape(node))))
            first, second = (0, 1) if len(node.args) == 1 else _integers(node.args[1:])
            order[first], order[second] = order[second], order[first]
            args = (parent(node), order)
            substitute(node, call(graph_module.graph, node, aten.permute.default, *args, like=node))


def _integers(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _keeps_batch(source: fx.Node, expanded: fx.Node) -> bool:
    """Whether -1, which means "unchanged", may replace each symbolic size of an expand."""
    old, new = shape(source), shape(expanded)
    padded = [1] * (len(new) - len(old)) + list(old)
    return all(
        isinstance(size, int) or str(size) == str(before)
        for before, size in zip(padded, new, strict=True)
    )


def _same_value_type(a: fx.Node, b: fx.Node) -> bool:
    return same_shape(a, b) and bool(a.meta["val"].dtype == b.meta["val"].dtype)


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
        left, right = node.args[:2]
        for difference, c in ((left, right), (right, left)):
            value = _minuend(difference, c)
            if value is not None and same_shape(value, node):
                substitute(node, value)
                break


def _minuend(difference: object, c: object) -> fx.Node | None:
    """Return a when `difference` is `a - c`."""
    if not isinstance(difference, fx.Node) or not isinstance(c, fx.Node):
        return None
    if not is_call(difference, aten.sub.Tensor):
        return None
    named = arguments(difference)
    matches = named["other"] is c and named["alpha"] == 1
    return named["self"] if matches and isinstance(named["self"], fx.Node) else None


def _pads_behind(graph_module: fx.GraphModule) -> None:
    """`f(pad(x))` becomes `pad(f(x))` for zero pads and usual functions `f` with f(0) = 0.

    After this, zeros that a model pads before its sign are the zero padding of a convolution.
    """
    for node in _calls(graph_module):
        if not _maps_zero_to_zero(node):
            continue
        pad = parent(node)
        if not is_call(pad, aten.constant_pad_nd.default) or arguments(pad)["value"] != 0:
            continue
        inner = repeat_call(graph_module.graph, node, node, parent(pad))
        inner.meta["val"] = parent(pad).meta["val"]
        inner.meta.pop("source", None)  # a value that the captured graph has not
        outer = repeat_call(graph_module.graph, node, pad, inner)
        outer.meta["source"] = node.meta.get("source")
        substitute(node, outer)


def _maps_zero_to_zero(node: fx.Node) -> bool:
    if is_call(node, aten.sign.default, aten.sgn.default, aten.tanh.default):
        return True
    limits = clamp_limits(node)
    return limits is not None and limits[0] <= 0 <= limits[1]


def _reversed_differences(graph_module: fx.GraphModule) -> None:
    """`s - x` with a number s becomes `-x + s`, which rounds the same."""
    for node in _calls(graph_module):
        if not is_call(node, aten.rsub.Scalar) or arguments(node)["alpha"] != 1:
            continue
        graph = graph_module.graph
        negated = call(graph, node, aten.neg.default, parent(node), like=node)
        negated.meta.pop("source", None)  # a value that the captured graph has not
        substitute(node, call(graph, node, aten.add.Tensor, negated, node.args[1], like=node))


def _broadcast_operands(graph_module: fx.GraphModule) -> None:
    """`x + c.expand_as(x)` becomes `x + c`."""
    for node in _calls(graph_module):
        if not is_call(node, *_BROADCASTING):
            continue
        for position, other in ((0, 1), (1, 0)):
            operand, wide = node.args[position], node.args[other]
            if not isinstance(operand, fx.Node) or not isinstance(wide, fx.Node):
                continue
            if is_call(operand, aten.expand.default) and same_shape(wide, node):
                node.update_arg(position, parent(operand))
