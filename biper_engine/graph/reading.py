"""The parts of a converted network's `torch.fx.GraphModule`, and how to walk it.

Placeholders are flat tensor inputs, get_attr nodes constants, call_function nodes operators of
`torch.ops` or `operator.getitem`, and the output node returns a flat tuple or list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

__all__ = [
    "Call",
    "arguments",
    "biper_op",
    "constant",
    "defaults_of",
    "evaluate",
    "get_constant",
    "interpret",
    "is_bconv2d",
    "is_call",
    "output_values",
    "packed_map",
    "parent",
    "same_shape",
    "shape",
    "with_defaults",
]

Call = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]

# Operators whose result is a packed map, and its position in a tuple of results.
_PACKED_RESULTS = {
    "binarize": None,
    "bmaxpool2d": None,
    "bconv2d_bits": None,
    "bconv2d_float_bits": 1,
}


# A schema stores a default dtype as its number.
_COUNTED_DTYPES: dict[Any, torch.dtype] = {4: torch.int64, 6: torch.float32}


def is_call(node: object, *targets: Any) -> bool:
    """Whether `node` calls one of `targets` (overloads or functions)."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def biper_op(node: fx.Node) -> str | None:
    """Return the name of the `torch.ops.biper` operator that a node calls, or None."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return None
    namespace, _, name = target._schema.name.partition("::")
    return name if namespace == "biper" else None


def is_bconv2d(node: fx.Node) -> bool:
    """Whether a node is a binary convolution, with or without an epilogue."""
    return (biper_op(node) or "").startswith("bconv2d")


def packed_map(node: fx.Node, result: Any) -> Tensor | None:
    """Return the packed map in a node's result, or None if it has none."""
    op = biper_op(node)
    if op not in _PACKED_RESULTS:
        return None
    position = _PACKED_RESULTS[op]
    packed: Tensor = result if position is None else result[position]
    return packed


def parent(node: fx.Node, position: int = 0) -> fx.Node:
    """Return the node that is a positional argument of a call."""
    value = node.args[position]
    assert isinstance(value, fx.Node), f"argument {position} of {node} is not a node"
    return value


def shape(node: fx.Node) -> tuple[Any, ...]:
    """Return the shape of a node's value; the batch may be symbolic."""
    return tuple(node.meta["val"].shape)


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have the same shape; symbolic sizes are compared as expressions."""
    if not all(isinstance(node.meta.get("val"), Tensor) for node in (a, b)):
        return False  # a size
    return [str(size) for size in shape(a)] == [str(size) for size in shape(b)]


def output_values(graph: fx.Graph) -> tuple[Any, ...]:
    """Return the values that the output node returns: nodes, or constants such as None."""
    values = graph.output_node().args[0]
    return tuple(values) if isinstance(values, tuple | list) else (values,)


def get_constant(module: torch.nn.Module, target: str) -> Any:
    """Return the tensor at a get_attr node's dotted target.

    Raises:
        AttributeError: there is no such attribute.
    """
    return functools.reduce(getattr, target.split("."), module)


def constant(module: torch.nn.Module, node: object) -> Tensor | None:
    """Return the tensor that a get_attr node holds, or None for any other value."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = get_constant(module, str(node.target))
    return value if isinstance(value, Tensor) else None


@functools.cache
def defaults_of(target: OpOverload) -> Mapping[str, Any]:
    """Return the default values of an operator's arguments, by the schema's names."""
    # Our own operators return float32 unless they are given a dtype.
    counted = {**_COUNTED_DTYPES, None: torch.float32 if target.namespace == "biper" else None}
    return {
        a.name: counted.get(a.default_value, a.default_value)
        if str(a.real_type) in ("ScalarType", "Optional[ScalarType]")
        else a.default_value
        for a in target._schema.arguments
        if a.has_default_value()
    }


def with_defaults(
    target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a value for every argument of an operator's schema, in its order.

    A missing argument gets its default, or None if it has no default.

    Raises:
        TypeError: there are more arguments than the operator takes.
    """
    names = [argument.name for argument in target._schema.arguments]
    if len(args) > len(names):
        raise TypeError(f"{target} takes {len(names)} arguments, but a call passes {len(args)}.")
    given = dict(zip(names, args, strict=False))
    return {**dict.fromkeys(names), **defaults_of(target), **given, **kwargs}


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operator call by the schema's names, defaults included."""
    assert isinstance(node.target, OpOverload), f"{node.target} has no schema"
    return with_defaults(node.target, node.args, node.kwargs)


def interpret(module: fx.GraphModule, inputs: Sequence[Any], call: Call) -> tuple[Any, ...]:
    """Run a graph node by node.

    Args:
        module: a converted network.
        inputs: the values of the placeholders, in order.
        call: called with each call_function node and its arguments' values; returns its result.

    Returns:
        The flat outputs.
    """
    results: dict[fx.Node, Any] = {}
    remaining = iter(inputs)

    def value_of(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: results[node])

    for node in module.graph.nodes:
        if node.op == "placeholder":
            results[node] = next(remaining)
        elif node.op == "get_attr":
            results[node] = get_constant(module, node.target)
        elif node.op == "call_function":
            results[node] = call(node, value_of(node.args), value_of(node.kwargs))
    return tuple(value_of(value) for value in output_values(module.graph))


def evaluate(node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
    """Run one call_function node on the given values of its inputs."""

    def look_up(leaf: Any) -> Any:
        return values[leaf] if isinstance(leaf, fx.Node) else leaf

    args, kwargs = pytree.tree_map(look_up, (node.args, node.kwargs))
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator,no-any-return]
