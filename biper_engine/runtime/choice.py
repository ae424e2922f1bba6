"""Which backend runs the nodes of a network, answered without running them."""

from __future__ import annotations

import torch
from torch import fx

from biper_engine.geometry import Conv2dGeometry
from biper_engine.ops.backends import select
from biper_engine.runtime.graph import biper_op, conv_geometry, get_constant, named_arguments

__all__ = ["backends_of", "node_backend", "node_geometry"]


def node_geometry(module: fx.GraphModule, node: fx.Node) -> Conv2dGeometry | None:
    """Return the geometry of a binary convolution with constant weights, None for other nodes."""
    if not (biper_op(node) or "").startswith("bconv2d"):
        return None
    arguments = named_arguments(node)
    weight = arguments["weight"]
    if weight.op != "get_attr":
        return None
    return conv_geometry(arguments, get_constant(module, str(weight.target)))


def node_backend(module: fx.GraphModule, node: fx.Node, device: torch.device | None) -> str | None:
    """Return the name of the backend that runs a node now, None for a float operator.

    Args:
        module: a converted network.
        node: one of its nodes.
        device: where the network's tensors are; None means the CPU.

    Raises:
        BackendUnavailableError: a backend is forced that cannot run the node.
    """
    op = biper_op(node)
    if op is None:
        return None
    return select(op, node_geometry(module, node), device or torch.device("cpu")).name


def backends_of(module: fx.GraphModule, device: torch.device | None) -> tuple[str, ...]:
    """Return the names of the backends that run a network now, in alphabetical order.

    Raises:
        BackendUnavailableError: a backend is forced that cannot run the network.
    """
    names = {node_backend(module, node, device) for node in module.graph.nodes}
    return tuple(sorted(name for name in names if name is not None))
