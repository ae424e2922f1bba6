"""Small edits of a graph, from which every pass is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

__all__ = ["call", "constant_node", "repeat_call", "substitute"]


def constant_node(graph_module: fx.GraphModule, before: fx.Node, tensor: Tensor) -> fx.Node:
    """Insert a get_attr node that holds `tensor` before a node."""
    # Also a tensor that has two names takes up both of them.
    held = graph_module.named_buffers(remove_duplicate=False)
    name = f"_folded{sum(name.startswith('_folded') for name, _ in held)}"
    graph_module.register_buffer(name, tensor)
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.get_attr(name)
    node.meta["val"] = tensor
    return node


def call(
    graph: fx.Graph, before: fx.Node, target: Callable[..., Any], *args: Any, like: fx.Node
) -> fx.Node:
    """Insert a call before a node; it gets the meta of `like`, whose value it reproduces."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    return node


def repeat_call(graph: fx.Graph, before: fx.Node, original: fx.Node, x: fx.Node) -> fx.Node:
    """Insert a copy of a call before a node, with another first argument."""
    with graph.inserting_before(before):
        node = graph.node_copy(original, lambda argument: argument)
    node.update_arg(0, x)
    return node


def substitute(old: fx.Node, new: fx.Node) -> None:
    """Replace `old` by `new` and erase it."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
