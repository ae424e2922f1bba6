"""Where an engine's time goes: its plan, run step by step with a clock around each."""

from __future__ import annotations

import operator
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.graph.choice import node_backend, node_geometry
from biper_engine.graph.reading import biper_op, interpret
from biper_engine.ops.precision import without_tf32
from biper_engine.runtime.native import NativePlan
from biper_engine.runtime.plan import bound_graph

__all__ = ["NodeProfile", "ProfileReport", "profile"]


@dataclass(frozen=True, kw_only=True)
class NodeProfile:
    """One operator of the network, or one step of a native program.

    Attributes:
        name: of its node, which is made from the layer's; of the first one of a step.
        op: "bconv2d_bits" and the like, or a float operator; those of a step joined by " + ".
        backend: what ran it; "torch" for operators that torch ran.
        ms: median wall-clock time, a call from Python included where there was one.
        macs: multiply-accumulates on bits, of the whole batch, padded taps counted; None for an
            operator without any.
        program: which of the network's native programs it is a step of, from 0 on; None for an
            operator outside of them.
        reason: why the operator is in none of them, where there are any; else None.
    """

    name: str
    op: str
    backend: str
    ms: float
    macs: int | None = None
    program: int | None = None
    reason: str | None = None

    @property
    def macs_per_second(self) -> float | None:
        """Rate of multiply-accumulates on bits, None without any."""
        return None if self.macs is None else self.macs / (self.ms * 1e-3)


@dataclass(frozen=True, kw_only=True)
class ProfileReport:
    """Every operator of one call, in order.

    Attributes:
        batch: images of the call.
        rounds: calls that the medians are of.
        threads: of the cpu backend where it ran something, else torch's.
        nodes: one row per operator.
        call_ms: median of whole calls from Python, made in turn with those that the rows are of.
        outside_ms: `call_ms` less the median of the sums of the rows of a call: the checks of a
            call, its outputs, and what lies between operators. A difference of two medians, it can
            be negative where calls differ by more than that.
        peak_macs_per_second: what popcounts on registers alone reach on that many cores, measured
            with the report; None where the cpu backend ran no binary convolution.
        isa: instruction set of that peak, or None.
    """

    batch: int
    rounds: int
    threads: int
    nodes: tuple[NodeProfile, ...]
    call_ms: float
    outside_ms: float
    peak_macs_per_second: float | None = None
    isa: str | None = None

    @property
    def total_ms(self) -> float:
        """Sum of the rows."""
        return sum(node.ms for node in self.nodes)

    def share(self, node: NodeProfile) -> float:
        """Return the time of one of the rows over that of all."""
        return node.ms / self.total_ms if self.total_ms else 0.0

    def share_of_peak(self, node: NodeProfile) -> float | None:
        """Return the rate of one of the rows over the peak, None where either is unknown."""
        rate = node.macs_per_second
        if rate is None or self.peak_macs_per_second is None or node.backend != "cpu":
            return None
        return rate / self.peak_macs_per_second

    def table(self) -> str:
        """Return the report as aligned text, 80 columns where names allow."""
        width = max([len("operator"), *(len(node.name) for node in self.nodes)])
        heading = f"{'operator':{width}}  {'runs on':9}  {'us':>9}  {'share':>6}  {'GMAC/s':>7}"
        peak = self.peak_macs_per_second
        lines = [heading + ("   peak" if peak is not None else "")]
        lines += [self._line(node, width) for node in self.nodes]
        lines.append(
            f"{'total':{width}}  {'':9}  {1e3 * self.total_ms:9.1f}  medians of {self.rounds} "
            f"calls, batch {self.batch}"
        )
        lines.append(
            f"{'a whole call':{width}}  {'':9}  {1e3 * self.call_ms:9.1f}  "
            f"{1e3 * self.outside_ms:.1f} outside of the above"
        )
        if peak is not None:
            threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
            lines.append(
                f"peak: {peak * 1e-9:,.0f} GMAC/s, popcounts on registers, measured now "
                f"({self.isa}, {threads})"
            )
        return "\n".join([*lines, *self._programs()])

    def _programs(self) -> list[str]:
        """Return how many programs there are, and why operators are outside of them."""
        steps = Counter(node.program for node in self.nodes if node.program is not None)
        if not steps:
            return []
        counts = ", ".join(map(str, steps.values()))
        lines = [f"native programs: {len(steps)}, steps: {counts}"]
        return lines + [f"outside: {node.reason}" for node in self.nodes if node.reason]

    def _line(self, node: NodeProfile, width: int) -> str:
        line = f"{node.name:{width}}  {node.backend:9}  {1e3 * node.ms:9.1f}"
        line += f"  {self.share(node):6.1%}"
        rate, of_peak = node.macs_per_second, self.share_of_peak(node)
        if rate is not None:
            line += f"  {rate * 1e-9:7,.0f}"
        return line + (f"  {of_peak:5.0%}" if of_peak is not None else "")

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of JSON values."""
        return {
            "batch": self.batch,
            "rounds": self.rounds,
            "threads": self.threads,
            "total_ms": self.total_ms,
            "call_ms": self.call_ms,
            "outside_ms": self.outside_ms,
            "peak_macs_per_second": self.peak_macs_per_second,
            "isa": self.isa,
            "nodes": [
                {
                    "name": node.name,
                    "op": node.op,
                    "backend": node.backend,
                    "ms": node.ms,
                    "share": self.share(node),
                    "macs": node.macs,
                    "macs_per_second": node.macs_per_second,
                    "share_of_peak": self.share_of_peak(node),
                    "program": node.program,
                    "reason": node.reason,
                }
                for node in self.nodes
            ],
        }


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
        times = _measure(bound_graph(module, device, native), inputs, device, rounds, call)
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


_IN_A_ROW = 5  # calls


@dataclass(frozen=True)
class _Times:
    """Seconds of calls in order.

    Attributes:
        nodes: for every operator and program, the sizes of its first tensor, and for each call the
            times of the program's steps, or a single one.
        inside: sums of these.
        calls: whole calls, in turn with those.
    """

    nodes: dict[fx.Node, tuple[Sequence[int], list[list[float]]]]
    inside: list[float]
    calls: list[float]


def _rows(
    times: _Times,
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


def _measure(
    bound: fx.GraphModule,
    inputs: Sequence[Tensor],
    device: torch.device | None,
    rounds: int,
    call: Callable[[], Any],
) -> _Times:
    """Run a network node by node with a clock, in turn with some of `call` in a row.

    Calls in a row find their code in the caches, as they do without us.
    """
    times, now = _Times({}, [], []), _clock(device)

    def run_node(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert callable(node.target)
        if node.target is operator.getitem:
            return node.target(*args)
        run = node.meta.get("run")
        if run is not None:
            result, taken = run.program.timed(*args)
        else:
            start = now()
            result = node.target(*args, **kwargs)
            taken = [now() - start]
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        sizes = tensors[0].shape if tensors else ()
        times.nodes.setdefault(node, (sizes, []))[1].append(taken)
        times.inside[-1] += sum(taken)
        return result

    def time_call() -> None:
        start = now()
        call()
        times.calls.append(now() - start)

    bound.forward(*inputs)  # warms up
    for first in range(0, rounds, _IN_A_ROW):
        turns = range(first, min(first + _IN_A_ROW, rounds))
        for _ in turns:
            times.inside.append(0.0)
            interpret(bound, inputs, run_node)
        call()
        for _ in turns:
            time_call()
    return times


def _limits(nodes: Sequence[NodeProfile]) -> tuple[int, float | None, str | None]:
    """Return the threads that ran the nodes, the popcount peak of so many cores, and its ISA."""
    if all(node.backend != "cpu" for node in nodes):
        return torch.get_num_threads(), None, None
    from biper_engine.ops import cpu

    threads = cpu.thread_count()
    if all(node.backend != "cpu" or node.macs is None for node in nodes):
        return threads, None, None
    peak = cpu.popcount_peak()
    return threads, threads * peak.macs_per_second, peak.isa


def _clock(device: torch.device | None) -> Callable[[], float]:
    """Return a clock of the work on a device, in seconds."""
    if device is None or device.type != "cuda":
        return perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return perf_counter()

    return now
