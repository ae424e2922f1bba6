"""What a converted network's `torch.fx.GraphModule` consists of, and how to walk it.

Placeholders are flat tensor inputs, get_attr nodes constants, call_function nodes operators of
`torch.ops` or `operator.getitem`, and the output node returns a flat tuple or list.
"""

from __future__ import annotations

import functools
import linecache
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from biper_engine.geometry import Conv2dGeometry

__all__ = [
    "Call",
    "PortableGraph",
    "align_weights",
    "biper_op",
    "conv_geometry",
    "from_portable",
    "get_constant",
    "interpret",
    "isolate_outputs",
    "named_arguments",
    "output_values",
    "packed_map",
    "release_source",
    "to_portable",
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


def _aliased(node: fx.Node) -> fx.Node | None:
    """Return the node whose memory this one may show, as the operator's schema says, or None."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    for argument in node.target._schema.arguments:
        source = named_arguments(node).get(argument.name)
        if argument.alias_info is not None and isinstance(source, fx.Node):
            return source
    return None


def _root(node: fx.Node) -> fx.Node:
    source = _aliased(node)
    while source is not None:
        node, source = source, _aliased(source)
    return node


def isolate_outputs(module: fx.GraphModule) -> None:
    """Clone, in place, every returned value that shows an input's or a constant's memory."""
    output = module.graph.output_node()
    values = list(output_values(module.graph))
    clones: dict[fx.Node, fx.Node] = {}
    for position, value in enumerate(values):
        if not isinstance(value, fx.Node) or _root(value).op not in ("placeholder", "get_attr"):
            continue
        if value not in clones:
            with module.graph.inserting_before(output):
                clones[value] = module.graph.create_node(
                    "call_function", torch.ops.aten.clone.default, (value,), name=f"{value}_copy"
                )
        values[position] = clones[value]
    if clones:
        output.args = (tuple(values),)
        module.recompile()


def align_weights(module: fx.GraphModule) -> None:
    """Give the weights of float 2-d convolutions channels_last memory, in place.

    torch then returns channels_last maps also for contiguous images, as binary operators want them.
    """
    convolutions = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)
    for node in module.graph.nodes:
        weight = named_arguments(node)["weight"] if node.target in convolutions else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            tensor = get_constant(module, str(weight.target))
            if tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


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


@dataclass(frozen=True)
class _Reference:
    """A node's name, where a picklable argument stands for the node."""

    name: str


@dataclass(frozen=True)
class _Operator:
    """An operator's qualified name; overloads themselves do not pickle in every version."""

    name: str
    overload: str

    def resolve(self) -> Any:
        namespace, _, name = self.name.partition("::")
        return getattr(getattr(getattr(torch.ops, namespace), name), self.overload)


@dataclass(frozen=True)
class PortableGraph:
    """A GraphModule as plain picklable data; names survive, which `GraphModule` itself loses."""

    nodes: tuple[tuple[str, str, Any, Any, Any], ...]
    constants: dict[str, Any]

    @staticmethod
    def reference(name: str) -> Any:
        """Return what stands for the node called `name` in another node's arguments."""
        return _Reference(name)


def to_portable(module: fx.GraphModule) -> PortableGraph:
    """Return a picklable form of a converted network; tensors are shared, not copied."""
    nodes, constants = [], {}
    for node in module.graph.nodes:
        target = node.target
        if isinstance(target, OpOverload):
            target = _Operator(target._schema.name, target._overloadname)
        if node.op == "get_attr":
            constants[target] = get_constant(module, target)
        nodes.append((node.op, node.name, target, _plain(node.args), _plain(node.kwargs)))
    return PortableGraph(tuple(nodes), constants)


def _plain(value: Any) -> Any:
    """Replace nodes by references, and fx's immutable containers by Python's own."""
    if isinstance(value, fx.Node):
        return _Reference(value.name)
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, list):
        return list(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def from_portable(portable: PortableGraph) -> fx.GraphModule:
    """Rebuild the GraphModule of `to_portable`."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        if isinstance(value, _Reference):
            return made[value.name]
        if isinstance(value, tuple | list):
            return type(value)(map(resolve, value))
        if isinstance(value, dict):
            return {key: resolve(item) for key, item in value.items()}
        return value

    for op, name, target, args, kwargs in portable.nodes:
        resolved = target.resolve() if isinstance(target, _Operator) else target
        made[name] = graph.create_node(op, resolved, resolve(args), resolve(kwargs), name=name)
    return release_source(fx.GraphModule(portable.constants, graph))


def release_source(module: fx.GraphModule) -> fx.GraphModule:
    """Let the source of a graph go when the module goes; return the module.

    torch.fx keeps the text that it compiled of every graph, for tracebacks, until the process ends:
    18 kB for a ResNet-20, at each load. A module that is recompiled later has another text.
    """
    forward: Any = type(module).forward
    weakref.finalize(module, _forget_source, forward.__code__.co_filename).atexit = False
    return module


def _forget_source(name: str) -> None:
    linecache.cache.pop(name, None)
    fx.graph_module._loader.eval_cache.pop(name, None)
