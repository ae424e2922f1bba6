"""A converted network's graph as plain data that can be pickled and rebuilt."""

from __future__ import annotations

import linecache
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from biper_engine.graph.reading import get_constant

__all__ = ["PortableGraph", "from_portable", "release_source", "to_portable"]


@dataclass(frozen=True)
class _Reference:
    """A node's name, which replaces the node in a picklable argument."""

    name: str


@dataclass(frozen=True)
class _Operator:
    """An operator's qualified name; not every version of torch can pickle overloads."""

    name: str
    overload: str

    def resolve(self) -> Any:
        namespace, _, name = self.name.partition("::")
        return getattr(getattr(getattr(torch.ops, namespace), name), self.overload)


@dataclass(frozen=True)
class PortableGraph:
    """A GraphModule as plain picklable data; it keeps names, which `GraphModule` itself loses."""

    nodes: tuple[tuple[str, str, Any, Any, Any], ...]
    constants: dict[str, Any]

    @staticmethod
    def reference(name: str) -> Any:
        """Return the value that replaces the node called `name` in another node's arguments."""
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
    """Free the source of a graph together with its module; return the module.

    torch.fx keeps the compiled source of every graph, for tracebacks, until the process ends:
    18 kB for a ResNet-20, at each load. A module that is recompiled later has another source.
    """
    forward: Any = type(module).forward
    weakref.finalize(module, _forget_source, forward.__code__.co_filename).atexit = False
    return module


def _forget_source(name: str) -> None:
    linecache.cache.pop(name, None)
    fx.graph_module._loader.eval_cache.pop(name, None)
