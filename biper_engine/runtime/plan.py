"""The plan of a network: native programs, CUDA graphs, or operators one by one.

On a CPU it is programs where that can be, on a CUDA GPU graphs of all operators. Operators that run
one by one, or are captured so, are bound once to the backend that runs them. A plan belongs to one
device and one forced backend. It is made at the first call, outside the state dict, from copies of
the network's tensors (see `tensors`), and another is made where these have changed.
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
from biper_engine.runtime.native import NativePlan, native_plan
from biper_engine.runtime.runs import NativeRun
from biper_engine.runtime.tensors import Watch, own_tensors, refuse_gradients

__all__ = ["Plan", "PlanSlot", "bound_graph", "is_watched"]


_PRE_DISPATCH = DispatchKey.PreDispatch  # where make_fx(..., pre_dispatch=True) records


def is_watched() -> bool:
    """Whether calls are only recorded now, by a dispatch mode or by `torch.jit.trace`."""
    return (
        _len_torch_dispatch_stack() > 0
        or _get_tracing_state() is not None
        or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    )


@dataclass(frozen=True)
class Plan:
    """How a network runs on one device.

    Attributes:
        module: the network, its float ends fused where the device's backends have that.
        device: where its tensors are.
        forced: the backend that was forced when it was made, or None.
        run: takes and returns what the graph does.
        native: the programs and what runs between them, or why there is no program.
        watch: holds while the network has the tensors that it was made from.
        graphs: what `run` is on a CUDA GPU, else None.
        program: the only one, where it is the whole network and takes a call's arguments as they
            are.
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
        """How it runs, in a few words."""
        if self.graphs is not None:
            return str(self.graphs)
        if isinstance(self.native, str):
            return f"operator by operator, since {self.native}"
        return str(self.native)

    def serves(self, device: torch.device | None, forced: str | None) -> bool:
        """Whether it is a plan for this device and backend, of the network as it is now."""
        return self.device == device and self.forced == forced and self.watch.holds()

    def warm_up(self, *inputs: Tensor) -> None:
        """Prepare all that calls with such inputs need."""
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
            inputs: what the network takes; without it there is no native program.
            positional: whether calls pass just that, each as an argument.

        Raises:
            BackendUnavailableError: a backend is forced that cannot run the network.
            RuntimeError: a plan is to be made while the caller captures a CUDA graph, or of tensors
                with gradients.
            TypeError, ValueError: it is to be made of tensors that no kernel can read.
        """
        forced = forced_name()
        plan = self._plan
        if plan is not None and plan.serves(device, forced):
            return plan
        # One lock per process: a lock that another thread held at a fork is never released here.
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            plan = self._plan
            if plan is None or not plan.serves(device, forced):
                self._plan = None  # what it holds goes before more is made
                generation = self._generation
                plan = _plan(module, device, forced, inputs, positional)
                # Weights that changed meanwhile made this plan stale: it serves this call alone.
                if generation == self._generation:
                    self._plan = plan
        return plan

    def run_as_is(self, inputs: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        """Run a network that is one program on tensors that need no more than its own checks.

        Returns:
            None, with nothing done, for any other network, arguments or modes of torch, and where
            there is no plan yet for the backend that is forced now and the tensors of now.
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
        """Whether there is no plan now."""
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
    # Plans outlive the mode of the call that makes them; an inference tensor would not.
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
                "The engine prepares its weights at its first call, which a CUDA graph that is "
                "being captured would not run: call it, or its `warmup`, before the capture."
            )
        native = f"the network is on {device}"
        watch, owned = own_tensors(module, device)
        module = fuse_ends(owned, device, inputs)
        bound = bound_graph(module, device, native)
        driver.synchronize()  # whatever stream the first caller is on, later ones are on others
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
    """Return a network that shares the tensors of `module`, its operators bound to what runs them.

    Runs of operators are calls of their native programs, the other `biper` operators are bound to
    backends. Where a node comes from is in its `meta`: "run" has the NativeRun of a program's call,
    "node" the node of any other operator. Constants get names without dots: attribute look-up by
    way of nested modules is slow.
    """
    graph = _BoundGraph(module, device)
    # Plans outlive the mode of the call that makes them; an inference tensor would not.
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
        """Add an operator, bound where it is one of ours."""
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
        for node in self._graph.find_nodes(op="get_attr"):  # what a bound operator holds by itself
            if not node.users:
                self._graph.erase_node(node)
                del self._constants[node.target]
        return release_source(fx.GraphModule(self._constants, self._graph))
