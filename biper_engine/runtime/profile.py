"""Where an engine's time goes: its plan, run step by step with a clock around each."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.runtime.choice import node_backend, node_geometry
from biper_engine.runtime.graph import biper_op, interpret
from biper_engine.runtime.native import NativePlan
from biper_engine.runtime.plan import bound_graph

__all__ = ["NodeProfile", "ProfileReport", "profile"]


@dataclass(frozen=True, kw_only=True)
class NodeProfile:
    """One operator of the network, or one step of its native program.

    Attributes:
        name: of its node, which is made from the layer's; of the first one of a step.
        op: "bconv2d_bits" and the like, or a float operator; those of a step joined by " + ".
        backend: what ran it; "torch" for operators that torch ran.
        ms: median wall-clock time, a call from Python included where there was one.
        macs: multiply-accumulates on bits, of the whole batch, padded taps counted; None for an
            operator without any.
    """

    name: str
    op: str
    backend: str
    ms: float
    macs: int | None = None

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
        peak_macs_per_second: what popcounts on registers alone reach on that many cores, measured
            with the report; None where the cpu backend ran no binary convolution.
        isa: instruction set of that peak, or None.
    """

    batch: int
    rounds: int
    threads: int
    nodes: tuple[NodeProfile, ...]
    peak_macs_per_second: float | None = None
    isa: str | None = None

    @property
    def total_ms(self) -> float:
        """Sum of the rows; a call also spends time between operators."""
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
        if peak is not None:
            threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
            lines.append(
                f"peak: {peak * 1e-9:,.0f} GMAC/s, popcounts on registers, measured now "
                f"({self.isa}, {threads})"
            )
        return "\n".join(lines)

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
                }
                for node in self.nodes
            ],
        }


def profile(
    module: fx.GraphModule,
    inputs: Sequence[Tensor],
    device: torch.device | None,
    rounds: int,
    native: NativePlan | None = None,
) -> ProfileReport:
    """Run a network's plan step by step, or node by node.

    Args:
        module: a converted network.
        inputs: its flat inputs.
        device: where its tensors are.
        rounds: calls to take medians of, after one to warm up.
        native: the network's program, where it runs as one.

    Raises:
        ValueError: `rounds` is below 1.
        BackendUnavailableError: a backend is forced that cannot run the network.
    """
    if rounds < 1:
        raise ValueError(f"`rounds` (={rounds}) must be 1 or more.")
    nodes = (
        _operators(module, inputs, device, rounds)
        if native is None
        else _steps(native, inputs, rounds)
    )
    threads, peak, isa = _limits(nodes)
    return ProfileReport(
        batch=len(inputs[0]) if inputs else 0,
        rounds=rounds,
        threads=threads,
        nodes=nodes,
        peak_macs_per_second=peak,
        isa=isa,
    )


def _steps(native: NativePlan, inputs: Sequence[Tensor], rounds: int) -> tuple[NodeProfile, ...]:
    taken = [native.program.step_seconds(*inputs) for _ in range(rounds + 1)][1:]
    return tuple(
        NodeProfile(
            name=step.nodes[0].name,
            op=" + ".join(_op(node) for node in step.nodes),
            backend="cpu",
            ms=1e3 * statistics.median(seconds),
            macs=None if step.macs is None else len(inputs[0]) * step.macs,
        )
        for step, seconds in zip(native.steps, zip(*taken, strict=True), strict=True)
    )


def _op(node: fx.Node) -> str:
    return biper_op(node) or str(node.target).removesuffix(".default")


def _operators(
    module: fx.GraphModule, inputs: Sequence[Tensor], device: torch.device | None, rounds: int
) -> tuple[NodeProfile, ...]:
    ms, macs = _measure(module, inputs, device, rounds)
    return tuple(
        NodeProfile(
            name=node.name,
            op=_op(node),
            backend=node_backend(module, node, device) or "torch",
            ms=ms[node.name],
            macs=macs.get(node.name),
        )
        for node in module.graph.nodes
        if node.op == "call_function" and node.target is not operator.getitem
    )


def _measure(
    module: fx.GraphModule, inputs: Sequence[Tensor], device: torch.device | None, rounds: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Return the median milliseconds of every node, and the work of the binary convolutions."""
    geometries = {node.name: node_geometry(module, node) for node in module.graph.nodes}
    seconds: dict[str, list[float]] = {}
    macs: dict[str, int] = {}

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert callable(node.target)
        start = _now(device)
        result = node.target(*args, **kwargs)
        seconds.setdefault(node.name, []).append(_now(device) - start)
        geometry = geometries[node.name]
        if geometry is not None:
            n, h, w, _ = (args[0] if args else kwargs["bits"]).shape
            macs[node.name] = n * geometry.macs(h, w)
        return result

    bound = bound_graph(module, device)
    for _ in range(rounds + 1):
        interpret(bound, inputs, call)
    return {name: 1e3 * statistics.median(taken[1:]) for name, taken in seconds.items()}, macs


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


def _now(device: torch.device | None) -> float:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
