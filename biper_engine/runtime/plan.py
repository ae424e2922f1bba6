"""The plan of a network: one native program where that can be, else operator by operator.

Operators that run one by one are bound once to the backend that runs them. A plan belongs to one
device and one forced backend. It is made at the first call, outside the state dict, and dropped
when the tensors it was made from move or change.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from biper_engine.ops.backends import forced_name
from biper_engine.runtime.binding import bind_node
from biper_engine.runtime.graph import get_constant, output_values
from biper_engine.runtime.native import NativePlan, native_plan

__all__ = ["Plan", "PlanSlot", "bound_graph"]

Images = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Plan:
    """How a network runs on one device.

    Attributes:
        device: where its tensors are.
        forced: the backend that was forced when it was made, or None.
        run: takes and returns what the graph does.
        native: the program that runs it, or why it runs operator by operator.
    """

    device: torch.device | None
    forced: str | None
    run: Callable[..., Any]
    native: NativePlan | str


class PlanSlot:
    """Holds at most one plan. Concurrent calls are safe; copies and pickles start empty."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._locks: dict[int, threading.Lock] = {}
        self._generation = 0

    def get(
        self, module: fx.GraphModule, device: torch.device | None, images: Images | None = None
    ) -> Plan:
        """Return the plan of `module` on `device` with the backend forced now, if any.

        Args:
            module: a converted network.
            device: where its tensors are.
            images: shape of one image of each input, [C, H, W], where all are float32 maps.

        Raises:
            BackendUnavailableError: a backend is forced that cannot run the network.
        """
        forced = forced_name()
        plan = self._plan
        if plan is not None and plan.device == device and plan.forced == forced:
            return plan
        # One lock per process: a lock that another thread held at a fork is never released here.
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            plan = self._plan
            if plan is None or plan.device != device or plan.forced != forced:
                generation = self._generation
                native = native_plan(module, device, images)
                run = (
                    bound_graph(module, device).forward
                    if isinstance(native, str)
                    else native.program
                )
                plan = Plan(device, forced, run, native)
                # Weights that changed meanwhile made this plan stale: it serves this call alone.
                if generation == self._generation:
                    self._plan = plan
        return plan

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


def bound_graph(module: fx.GraphModule, device: torch.device | None) -> fx.GraphModule:
    """Return a copy of a network that shares its tensors, its `biper` operators bound to backends.

    Constants get names without dots: attribute look-up by way of nested modules is slow.
    """
    constants: dict[str, Any] = {}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    # Plans outlive the mode of the call that makes them; an inference tensor would not.
    with torch.inference_mode(False), torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "output":
                continue
            if node.op == "get_attr":
                target = f"constant_{len(constants)}"
                constants[target] = get_constant(module, node.target)
                copies[node] = graph.create_node("get_attr", target, name=node.name)
                continue
            operation = bind_node(module, node, device)
            if operation is None:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                continue
            inputs = fx.node.map_arg(operation.inputs, copies.__getitem__)
            copies[node] = graph.create_node(
                "call_function", operation.call, inputs, name=node.name
            )
    returned = fx.node.map_arg(tuple(output_values(module.graph)), copies.__getitem__)
    graph.output(returned)
    for node in graph.find_nodes(op="get_attr"):  # what a bound operator holds by itself
        if not node.users:
            graph.erase_node(node)
            del constants[node.target]
    return fx.GraphModule(constants, graph)
