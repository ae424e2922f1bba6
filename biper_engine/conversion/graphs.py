"""Small steps that every pass over a captured graph needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

__all__ = [
    "arguments",
    "call",
    "constant",
    "constant_node",
    "evaluate",
    "is_call",
    "parent",
    "repeat_call",
    "same_shape",
    "shape",
    "substitute",
]


def is_call(node: object, *targets: Any) -> bool:
    """Whether `node` calls one of `targets` (overloads or functions)."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def parent(node: fx.Node, position: int = 0) -> fx.Node:
    """Return the node that is a positional argument of a call."""
    value = node.args[position]
    assert isinstance(value, fx.Node), f"argument {position} of {node} is no node"
    return value


def shape(node: fx.Node) -> tuple[Any, ...]:
    """Return the shape of a node's value; the batch may be symbolic."""
    return tuple(node.meta["val"].shape)


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have one shape; symbolic sizes are compared as expressions."""
    return [str(size) for size in shape(a)] == [str(size) for size in shape(b)]


def constant(graph_module: fx.GraphModule, node: object) -> Tensor | None:
    """Return the tensor that a get_attr node holds, or None for any other node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner: Any = graph_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    return owner if isinstance(owner, Tensor) else None


def constant_node(graph_module: fx.GraphModule, before: fx.Node, tensor: Tensor) -> fx.Node:
    """Insert a get_attr node that holds `tensor` before a node."""
    index = sum(name.startswith("_folded") for name, _ in graph_module.named_buffers())
    name = f"_folded{index}"
    graph_module.register_buffer(name, tensor)
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.get_attr(name)
    node.meta["val"] = tensor
    return node


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an ATen call by schema name, defaults filled in."""
    assert isinstance(node.target, OpOverload), f"{node.target} has no schema"
    schema = node.target._schema
    values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    values |= {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}
    return values | dict(node.kwargs)


def call(
    graph: fx.Graph, before: fx.Node, target: Callable[..., Any], *args: Any, like: fx.Node
) -> fx.Node:
    """Insert a call before a node; it takes over the meta of `like`, whose value it reproduces."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    return node


def repeat_call(graph: fx.Graph, before: fx.Node, original: fx.Node, x: fx.Node) -> fx.Node:
    """Insert a copy of a call before a node, on another first argument."""
    with graph.inserting_before(before):
        node = graph.node_copy(original, lambda argument: argument)
    node.update_arg(0, x)
    return node


def substitute(old: fx.Node, new: fx.Node) -> None:
    """Let `new` take the place of `old`, which is erased."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def evaluate(node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
    """Run one call_function node on given values of its inputs."""

    def look_up(leaf: Any) -> Any:
        return values[leaf] if isinstance(leaf, fx.Node) else leaf

    args, kwargs = pytree.tree_map(look_up, (node.args, node.kwargs))
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator,no-any-return]
