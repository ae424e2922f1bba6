"""Where an engine's time goes: its plan, run step by step with a clock around each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.graph.choice import node_backend, node_geometry
from biper_engine.graph.reading import biper_op
from biper_engine.ops import cpu_processor
from biper_engine.ops.cpu_threads import thread_count
from biper_engine.ops.precision import without_tf32
from biper_engine.runtime.native import NativePlan
from biper_engine.runtime.plan import bound_graph
from biper_engine.runtime.profile_report import NodeProfile, ProfileReport
from biper_engine.runtime.profile_times import Times, measure

__all__ = ["profile"]


def profile(
    module: fx.GraphModule,
    inputs: Sequence[Tensor],
    device: torch.device | None,
    rounds: int,
    native: NativePlan | str,
    call: Callable[[], Any],
) -> ProfileReport:
    """Run a network's plan: its programs step by step, the other operators one by one.

    Args:
        module: a converted network.
        inputs: its flat inputs.
        device: where its tensors are.
        rounds: calls to take medians of, of both kinds.
        native: of the plan: its programs, or why there are none.
        call: makes the same call as a whole.

    Raises:
        ValueError: `rounds` is below 1.
        BackendUnavailableError: a backend is forced that cannot run the network.
    """
    if rounds < 1:
        raise ValueError(f"`rounds` (={rounds}) must be 1 or more.")
    exact = without_tf32() if device is not None and device.type == "cuda" else nullcontext()
    with exact:
        times = measure(bound_graph(module, device, native), inputs, device, rounds, call)
    nodes = _rows(times, module, inputs, device)
    if isinstance(native, NativePlan):
        reasons = {node.name: reason for node, reason in native.reasons.items()}
        nodes = tuple(replace(row, reason=reasons.get(row.name)) for row in nodes)
    threads, peak, isa = _limits(nodes)
    call_ms, inside_ms = (1e3 * statistics.median(x) for x in (times.calls, times.inside))
    return ProfileReport(
        batch=len(inputs[0]) if inputs else 0,
        rounds=rounds,
        threads=threads,
        nodes=nodes,
        call_ms=call_ms,
        outside_ms=call_ms - inside_ms,
        peak_macs_per_second=peak,
        isa=isa,
    )


def _rows(
    times: Times,
    module: fx.GraphModule,
    inputs: Sequence[Tensor],
    device: torch.device | None,
) -> tuple[NodeProfile, ...]:
    batch = len(inputs[0]) if inputs else 0
    rows: list[NodeProfile] = []
    programs = 0
    for node, (sizes, taken) in times.nodes.items():
        ms = [1e3 * statistics.median(x) for x in zip(*taken, strict=True)]
        run = node.meta.get("run")
        if run is None:
            rows.append(_operator_row(module, node.meta["node"], device, ms[0], sizes))
            continue
        rows += [
            NodeProfile(
                name=step.nodes[0].name,
                op=" + ".join(_op(each) for each in step.nodes),
                backend="cpu",
                ms=step_ms,
                macs=None if step.macs is None else batch * step.macs,
                program=programs,
            )
            for step, step_ms in zip(run.steps, ms, strict=True)
        ]
        programs += 1
    return tuple(rows)


def _operator_row(
    module: fx.GraphModule,
    node: fx.Node,
    device: torch.device | None,
    ms: float,
    sizes: Sequence[int],
) -> NodeProfile:
    """Return the row of an operator that ran by itself; `sizes` are those of its first tensor."""
    geometry = node_geometry(module, node)
    macs = None if geometry is None else sizes[0] * geometry.macs(sizes[1], sizes[2])
    backend = node_backend(module, node, device) or "torch"
    return NodeProfile(name=node.name, op=_op(node), backend=backend, ms=ms, macs=macs)


def _op(node: fx.Node) -> str:
    return biper_op(node) or str(node.target).removesuffix(".default")


def _limits(nodes: Sequence[NodeProfile]) -> tuple[int, float | None, str | None]:
    """Return the threads that ran the nodes, the popcount peak of so many cores, and its ISA."""
    if all(node.backend != "cpu" for node in nodes):
        return torch.get_num_threads(), None, None
    threads = thread_count()
    if all(node.backend != "cpu" or node.macs is None for node in nodes):
        return threads, None, None
    peak = cpu_processor.popcount_peak()
    return threads, threads * peak.macs_per_second, peak.isa
