"""The default plan: run the graph op by op, with weights re-laid once for the backend that runs.

A plan belongs to one device and one forced backend. It is made at the first call, outside the state
dict, and dropped when the tensors it was made from move or change.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.ops.backends import forced_name, select
from biper_engine.runtime.graph import (
    biper_op,
    conv_geometry,
    get_constant,
    named_arguments,
    output_values,
)

__all__ = ["PlanSlot", "prepack_node"]


@dataclass(frozen=True)
class _Plan:
    device: torch.device | None
    forced: str | None
    run: Callable[..., Any]


class PlanSlot:
    """Holds at most one plan. Concurrent calls are safe; copies and pickles start empty."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None
        self._locks: dict[int, threading.Lock] = {}
        self._generation = 0

    def get(self, module: fx.GraphModule, device: torch.device | None) -> Callable[..., Any]:
        """Return the function that runs `module` on `device` with the backend forced now, if any.

        Raises:
            BackendUnavailableError: a backend is forced that cannot run the network.
        """
        forced = forced_name()
        plan = self._plan
        if plan is not None and plan.device == device and plan.forced == forced:
            return plan.run
        # One lock per process: a lock that another thread held at a fork is never released here.
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            plan = self._plan
            if plan is None or plan.device != device or plan.forced != forced:
                generation = self._generation
                plan = _Plan(device, forced, _prepacked(module).forward)
                # Weights that changed meanwhile made this plan stale: it serves this call alone.
                if generation == self._generation:
                    self._plan = plan
        return plan.run

    def drop(self) -> None:
        """Forget the plan; the next call makes a new one."""
        self._generation += 1
        self._plan = None

    @property
    def is_empty(self) -> bool:
        """Whether there is no plan now."""
        return self._plan is None

    def __deepcopy__(self, memo: dict[int, Any]) -> PlanSlot:
        return PlanSlot()

    def __reduce__(self) -> tuple[type[PlanSlot], tuple[()]]:
        return PlanSlot, ()


def prepack_node(node: fx.Node, weight: Tensor) -> Tensor:
    """Return the weights of a `bconv2d*` node re-laid for the backend that will run it.

    Raises:
        BackendUnavailableError: a backend is forced that cannot run the node.
    """
    op = biper_op(node)
    assert op is not None
    arguments = named_arguments(node)
    geometry = conv_geometry(arguments, weight)
    backend = select(op, geometry, weight.device)
    return torch.ops.biper.prepack(  # type: ignore[no-any-return]
        weight,
        in_channels=geometry.in_channels,
        stride=list(geometry.stride),
        padding=list(geometry.padding),
        dilation=list(geometry.dilation),
        groups=geometry.groups,
        backend=backend.name,
    )


def _prepacked(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a network that shares its tensors and passes `prepacked` weights.

    Constants get names without dots: attribute look-up by way of nested modules is slow.
    """
    constants: dict[str, Any] = {}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def constant(value: Any, name: str) -> fx.Node:
        target = f"constant_{len(constants)}"
        constants[target] = value
        return graph.create_node("get_attr", target, name=name)

    # Plans outlive the mode of the call that makes them; an inference tensor would not.
    with torch.inference_mode(False), torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "output":
                continue
            if node.op == "get_attr":
                copies[node] = constant(get_constant(module, node.target), node.name)
                continue
            prepacked = None
            if (biper_op(node) or "").startswith("bconv2d"):
                prepacked = _prepack(module, node, constant)
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if prepacked is not None:
                copies[node].update_kwarg("prepacked", prepacked)
    returned = fx.node.map_arg(tuple(output_values(module.graph)), copies.__getitem__)
    graph.output(returned)
    return fx.GraphModule(constants, graph)


def _prepack(
    module: fx.GraphModule, node: fx.Node, constant: Callable[[Any, str], fx.Node]
) -> fx.Node | None:
    """Make the constant that holds a node's re-laid weights, unless the weights are computed."""
    weight = named_arguments(node)["weight"]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    packed = prepack_node(node, get_constant(module, str(weight.target)))
    return constant(packed, f"{node.name}_prepacked")
