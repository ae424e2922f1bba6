"""What a converted network's `torch.fx.GraphModule` consists of, and how to walk it.

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

from biper_engine.geometry import Conv2dGeometry

__all__ = [
    "Call",
    "biper_op",
    "conv_geometry",
    "get_constant",
    "interpret",
    "named_arguments",
    "output_values",
    "packed_map",
    "with_defaults",
]

Call = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]

# Operators whose result is a packed map, and where it stands in a tuple of results.
_PACKED_RESULTS = {
    "binarize": None,
    "bmaxpool2d": None,
    "bconv2d_bits": None,
    "bconv2d_float_bits": 1,
}


def biper_op(node: fx.Node) -> str | None:
    """Return the name of the `torch.ops.biper` operator that a node calls, or None."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return None
    namespace, _, name = target._schema.name.partition("::")
    return name if namespace == "biper" else None


def packed_map(node: fx.Node, result: Any) -> Tensor | None:
    """Return the packed map in a node's result, or None where it makes none."""
    op = biper_op(node)
    if op not in _PACKED_RESULTS:
        return None
    position = _PACKED_RESULTS[op]
    packed: Tensor = result if position is None else result[position]
    return packed


def output_values(graph: fx.Graph) -> tuple[Any, ...]:
    """Return what the output node returns: nodes, or constants such as None."""
    values = graph.output_node().args[0]
    return tuple(values) if isinstance(values, tuple | list) else (values,)


def get_constant(module: torch.nn.Module, target: str) -> Any:
    """Return the tensor behind a get_attr node's dotted target.

    Raises:
        AttributeError: there is none.
    """
    return functools.reduce(getattr, target.split("."), module)


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operator call by the schema's names, defaults left out.

    Raises:
        TypeError: the call has more arguments than the schema.
    """
    assert isinstance(node.target, OpOverload)
    arguments = node.target._schema.arguments
    if len(node.args) > len(arguments):
        raise TypeError(
            f"Node {node.name!r} passes {len(node.args)} arguments, but {node.target} takes "
            f"{len(arguments)}."
        )
    named = {a.name: value for a, value in zip(arguments, node.args, strict=False)}
    return {**named, **node.kwargs}


def with_defaults(
    target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a value for every argument of an operator's schema, in its order.

    What is left out has its default, or None where it has none.
    """
    arguments = target._schema.arguments
    values = {argument.name: argument.default_value for argument in arguments}
    values |= {argument.name: value for argument, value in zip(arguments, args, strict=False)}
    return {**values, **kwargs}


def _integers(value: Any, length: int) -> tuple[Any, ...]:
    return (value,) * length if isinstance(value, int) else tuple(value)


def conv_geometry(arguments: Mapping[str, Any], weight: Tensor) -> Conv2dGeometry:
    """Return the geometry of a binary convolution from its named arguments and packed weights.

    Raises:
        GeometryError: the values make no geometry.
    """
    out_channels, height, width, _ = weight.shape
    return Conv2dGeometry(
        in_channels=arguments["in_channels"],
        out_channels=out_channels,
        kernel_size=(height, width),
        stride=_integers(arguments.get("stride", 1), 2),
        padding=_integers(arguments.get("padding", 0), 4),
        dilation=_integers(arguments.get("dilation", 1), 2),
        groups=arguments.get("groups", 1),
    )


def interpret(module: fx.GraphModule, inputs: Sequence[Any], call: Call) -> tuple[Any, ...]:
    """Run a graph node by node.

    Args:
        module: a converted network.
        inputs: the values of the placeholders, in order.
        call: gets each call_function node with the values of its arguments, and returns its result.

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
