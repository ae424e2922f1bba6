"""Which backend runs the nodes of a network, found without running them, and its weights."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from biper_engine.geometry import Conv2dGeometry
from biper_engine.graph.reading import arguments, biper_op, constant, is_bconv2d
from biper_engine.ops.backends import Backend, select
from biper_engine.ops.epilogue import steps_of
from biper_engine.ops.functional import geometry_options
from biper_engine.ops.registration import conv_geometry

__all__ = ["backends_of", "node_backend", "node_geometry", "prepack", "prepack_node"]


def node_geometry(module: fx.GraphModule, node: fx.Node) -> Conv2dGeometry | None:
    """Return the geometry of a binary convolution with constant weights, None for other nodes."""
    if not is_bconv2d(node):
        return None
    named = arguments(node)
    weight = constant(module, named["weight"])
    return None if weight is None else conv_geometry(weight, named)


def node_backend(module: fx.GraphModule, node: fx.Node, device: torch.device | None) -> str | None:
    """Return the name of the backend that runs a node now, None for a float operator.

    Args:
        module: a converted network.
        node: one of its nodes.
        device: device of the network's tensors; None means the CPU.

    Raises:
        BackendUnavailableError: a forced backend cannot run the node.
    """
    op = biper_op(node)
    if op is None:
        return None
    geometry = node_geometry(module, node)
    steps = steps_of(arguments(node))
    return select(op, geometry, device or torch.device("cpu"), steps).name


def backends_of(module: fx.GraphModule, device: torch.device | None) -> tuple[str, ...]:
    """Return the names of the backends that run a network now, in alphabetical order.

    Raises:
        BackendUnavailableError: a forced backend cannot run the network.
    """
    names = {node_backend(module, node, device) for node in module.graph.nodes}
    return tuple(sorted(name for name in names if name is not None))


def prepack_node(node: fx.Node, weight: Tensor) -> Tensor:
    """Return the weights of a `bconv2d*` node re-laid for the backend that will run it.

    Raises:
        BackendUnavailableError: a forced backend cannot run the node.
    """
    named = arguments(node)
    geometry = conv_geometry(weight, named)
    op = biper_op(node)
    assert op is not None
    return prepack(select(op, geometry, weight.device, steps_of(named)), weight, geometry)


def prepack(backend: Backend, weight: Tensor, geometry: Conv2dGeometry) -> Tensor:
    """Return the weights of a binary convolution re-laid for a backend."""
    options = geometry_options(geometry)
    packed: Tensor = torch.ops.biper.prepack(weight, **options, backend=backend.name)
    return packed
