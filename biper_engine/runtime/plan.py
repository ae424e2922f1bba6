"""The plan of a network: native programs, CUDA graphs, or operators one by one.

On a CPU it consists of programs if possible, on a CUDA GPU of graphs of all operators. Operators
that run or are captured one by one are bound once to the backend that runs them. A plan belongs to
one device and one forced backend. It is made at the first call, outside the state dict, from copies
of the network's tensors (see `tensors`), and made again if these have changed.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import (
    DispatchKey,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad

from biper_engine.graph.batching import images_are_independent
from biper_engine.graph.portable import release_source
from biper_engine.graph.reading import get_constant, output_values
from biper_engine.graph.signature import InputSpec
from biper_engine.ops.backends import forced_name
from biper_engine.ops.cpu_program import CpuProgram
from biper_engine.runtime.binding import bind_node
from biper_engine.runtime.cuda_driver import GraphDriver, graph_driver
from biper_engine.runtime.cuda_graphs import CudaGraphs, uncapturable_reason
from biper_engine.runtime.fusing import fuse_ends
from biper_engine.runtime.native import NativePlan, elsewhere, native_plan
from biper_engine.runtime.runs import NativeRun
from biper_engine.runtime.tensors import Watch, own_tensors, refuse_gradients

__all__ = ["Plan", "PlanSlot", "bound_graph", "is_watched"]


_PRE_DISPATCH = DispatchKey.PreDispatch  # make_fx(..., pre_dispatch=True) records here


def is_watched() -> bool:
    """Whether a dispatch mode or `torch.jit.trace` records calls now."""
    return (
        _len_torch_dispatch_stack() > 0
        or _get_tracing_state() is not None
        or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    )


@dataclass(frozen=True)
class Plan:
    """How a network runs on one device.

    Attributes:
        module: the network, with its float ends fused if the device's backends support that.
        device: where its tensors are.
        forced: the backend that was forced when the plan was made, or None.
        run: runs the network, with the arguments and results of the graph.
        native: the programs and the operators between them, or the reason why there is no program.
        watch: tells whether the network still has the tensors from which the plan was made.
        graphs: `run` on a CUDA GPU, or None.
        program: the program, if it is the whole network and takes a call's arguments unchanged.
    """

    module: fx.GraphModule
    device: torch.device | None
    forced: str | None
    run: Callable[..., Any]
    native: NativePlan | str
    watch: Watch
    program: CpuProgram | None = None
    graphs: CudaGraphs | None = None

    @property
    def execution(self) -> str:
        """A short description of how the network runs."""
        if self.graphs is not None:
            return str(self.graphs)
        if isinstance(self.native, str):
            return f"operator by operator, since {self.native}"
        return str(self.native)

    def serves(self, device: torch.device | None, forced: str | None) -> bool:
        """Whether this is a plan for the device, the backend and the network's current tensors."""
        return self.device == device and self.forced == forced and self.watch.holds()

    def warm_up(self, *inputs: Tensor) -> None:
        """Prepare everything that calls with such inputs need."""
        if self.graphs is not None:
            self.graphs.warm_up(*inputs)
        else:
            self.run(*inputs)


class PlanSlot:
    """Holds at most one plan. Concurrent calls are safe; copies and pickles start empty."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._locks: dict[int, threading.Lock] = {}
        self._generation = 0

    def get(
        self,
        module: fx.GraphModule,
        device: torch.device | None,
        inputs: Sequence[InputSpec] | None = None,
        *,
        positional: bool = False,
    ) -> Plan:
        """Return the plan of `module` on `device` with the backend forced now, if any.

        Args:
            module: a converted network.
            device: where its tensors are.
            inputs: the network's inputs; without them there is no native program.
            positional: whether calls pass exactly these, each as a positional argument.

        Raises:
            BackendUnavailableError: a backend is forced that cannot run the network.
            RuntimeError: a plan must be made while the caller captures a CUDA graph, or from
                tensors with gradients.
            TypeError, ValueError: it must be made from tensors that kernels cannot read.
        """
        forced = forced_name()
        plan = self._plan
        if plan is not None and plan.serves(device, forced):
            return plan
        # One lock per process: a lock that another thread held at a fork stays locked in the child.
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            plan = self._plan
            if plan is None or not plan.serves(device, forced):
                self._plan = None  # free its memory before making another
                generation = self._generation
                plan = _plan(module, device, forced, inputs, positional)
                # Weights that changed meanwhile make this plan outdated: only this call uses it.
                if generation == self._generation:
                    self._plan = plan
        return plan

    def run_as_is(self, inputs: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        """Run a network that is one program on tensors that need only the program's checks.

        Returns:
            None, without doing anything, for any other network, arguments or modes of torch, and if
            there is no plan yet for the backend forced now and the current tensors.
        """
        plan = self._plan
        if plan is None or plan.program is None or plan.forced != forced_name() or is_watched():
            return None
        if forward_ad._current_level >= 0:
            return None
        return plan.program.call_as_is(inputs, plan.watch)

    def drop(self) -> None:
        """Forget the plan; the next call makes a new one."""
        self._generation += 1
        self._plan = None

    @property
    def is_empty(self) -> bool:
        """Whether there is no plan."""
        return self._plan is None

    def __deepcopy__(self, memo: dict[int, Any]) -> PlanSlot:
        return PlanSlot()

    def __reduce__(self) -> tuple[type[PlanSlot], tuple[()]]:
        return PlanSlot, ()


def _plan(
    module: fx.GraphModule,
    device: torch.device | None,
    forced: str | None,
    inputs: Sequence[InputSpec] | None,
    positional: bool,
) -> Plan:
    refuse_gradients(module)
    driver = graph_driver(device)
    if driver is not None:
        return _graph_plan(module, device, forced, inputs, driver)
    # A plan outlives the mode of the call that makes it, so it must not hold inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        watch, owned = own_tensors(module, device)
        native = native_plan(owned, device, inputs)
        if isinstance(native, NativePlan) and native.is_whole:
            program = native.runs[0].program
            whole = program if positional else None
            return Plan(module, device, forced, program, native, watch, whole)
        if isinstance(native, str):
            fused = fuse_ends(owned, device, inputs)
            module, owned = (module if fused is owned else fused), fused
        return Plan(
            module, device, forced, bound_graph(owned, device, native).forward, native, watch
        )


def _graph_plan(
    module: fx.GraphModule,
    device: torch.device | None,
    forced: str | None,
    inputs: Sequence[InputSpec] | None,
    driver: GraphDriver,
) -> Plan:
    with driver.on_device():
        if driver.is_capturing():
            raise RuntimeError(
                "The engine prepares its weights at its first call, which cannot be part of a CUDA "
                "graph capture: call the engine, or its `warmup`, before the capture."
            )
        native = elsewhere(device)
        watch, owned = own_tensors(module, device)
        module = fuse_ends(owned, device, inputs)
        bound = bound_graph(module, device, native)
        driver.synchronize()  # later callers may be on other streams than the first
    graphs = CudaGraphs(
        bound.forward,
        driver,
        operators=sum(
            node.op == "call_function" and node.target is not operator.getitem
            for node in bound.graph.nodes
        ),
        independent=images_are_independent(module, inputs),
        reason=uncapturable_reason(module),
    )
    return Plan(module, device, forced, graphs, native, watch, graphs=graphs)


def bound_graph(
    module: fx.GraphModule, device: torch.device | None, native: NativePlan | str
) -> fx.GraphModule:
    """Return a network that shares the tensors of `module`, with bound operators.

    Runs of operators become calls of their native programs, other `biper` operators are bound to
    backends. `meta` of a node gives its origin: "run" is the NativeRun of a program's call, "node"
    the node of any other operator. Constants get names without dots, since attribute look-up
    through nested modules is slow.
    """
    graph = _BoundGraph(module, device)
    # A plan outlives the mode of the call that makes it, so it must not hold inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        for node in module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                graph.add_source(node)
        parts = module.graph.nodes if isinstance(native, str) else native.parts
        for part in parts:
            if isinstance(part, NativeRun):
                graph.add_run(part)
            elif part.op == "call_function":
                graph.add_operator(part)
    return graph.finish()


class _BoundGraph:
    def __init__(self, module: fx.GraphModule, device: torch.device | None) -> None:
        self._module = module
        self._device = device
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._constants: dict[str, Any] = {}

    def add_source(self, node: fx.Node) -> None:
        """Add a placeholder or a constant."""
        if node.op == "placeholder":
            self._copies[node] = self._graph.node_copy(node)
            return
        target = f"constant_{len(self._constants)}"
        self._constants[target] = get_constant(self._module, str(node.target))
        self._copies[node] = self._graph.create_node("get_attr", target, name=node.name)

    def add_run(self, run: NativeRun) -> None:
        """Add a call of a program, and its results."""
        inputs = tuple(self._copies[node] for node in run.inputs)
        call = self._graph.create_node("call_function", run.program.__call__, inputs)
        call.meta["run"] = run
        results: dict[int, fx.Node] = {}
        for node, at in run.outputs.items():
            if at not in results:
                results[at] = self._graph.create_node(
                    "call_function", operator.getitem, (call, at), name=node.name
                )
            self._copies[node] = results[at]

    def add_operator(self, node: fx.Node) -> None:
        """Add an operator, bound if it is one of ours."""
        operation = bind_node(self._module, node, self._device)
        if operation is None:
            copy = self._graph.node_copy(node, self._copies.__getitem__)
        else:
            inputs = fx.node.map_arg(operation.inputs, self._copies.__getitem__)
            copy = self._graph.create_node("call_function", operation.call, inputs, name=node.name)
        copy.meta = {"node": node}
        self._copies[node] = copy

    def finish(self) -> fx.GraphModule:
        """Return the module."""
        outputs = tuple(output_values(self._module.graph))
        self._graph.output(fx.node.map_arg(outputs, self._copies.__getitem__))
        for node in self._graph.find_nodes(op="get_attr"):  # held by bound operators
            if not node.users:
                self._graph.erase_node(node)
                del self._constants[node.target]
        return release_source(fx.GraphModule(self._constants, self._graph))
