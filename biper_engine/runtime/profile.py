"""Where an engine's time goes: its plan, run node by node with a clock around each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.geometry import Conv2dGeometry
from biper_engine.ops.backends import select
from biper_engine.runtime.graph import (
    biper_op,
    conv_geometry,
    get_constant,
    interpret,
    named_arguments,
)
from biper_engine.runtime.plan import bound_graph

__all__ = ["NodeProfile", "ProfileReport", "profile"]


@dataclass(frozen=True, kw_only=True)
class NodeProfile:
    """One operator of the network.

    Attributes:
        name: of its node, which is made from the layer's.
        op: "bconv2d_bits" and the like, or a float operator of torch.
        backend: what ran it; "torch" for float operators.
        ms: median wall-clock time, the call from Python included.
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
        threads: torch's number.
        nodes: one row per operator.
    """

    batch: int
    rounds: int
    threads: int
    nodes: tuple[NodeProfile, ...]

    @property
    def total_ms(self) -> float:
        """Sum of the rows."""
        return sum(node.ms for node in self.nodes)

    def table(self, peak_macs_per_second: float | None = None) -> str:
        """Return the report as aligned text, with each layer's share of a peak where one is given.

        Args:
            peak_macs_per_second: of all threads together; see `ops.cpu.popcount_peak`.
        """
        width = max([len("operator"), *(len(node.name) for node in self.nodes)])
        heading = f"{'operator':{width}}  {'runs on':9}  {'us':>8}  {'share':>6}  {'GMAC/s':>7}"
        lines = [heading + ("   peak" if peak_macs_per_second else "")]
        for node in self.nodes:
            line = f"{node.name:{width}}  {node.backend:9}  {1e3 * node.ms:8.1f}"
            line += f"  {node.ms / self.total_ms:6.1%}"
            rate = node.macs_per_second
            if rate is not None:
                line += f"  {rate * 1e-9:7,.0f}"
                line += f"  {rate / peak_macs_per_second:5.0%}" if peak_macs_per_second else ""
            lines.append(line)
        total = f"{1e3 * self.total_ms:8.1f}"
        lines.append(
            f"{'total':{width}}  {'':9}  {total}  median of {self.rounds} calls, batch {self.batch}"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of JSON values."""
        return asdict(self)


def profile(
    module: fx.GraphModule, inputs: Sequence[Tensor], device: torch.device | None, rounds: int
) -> ProfileReport:
    """Run a network's plan node by node.

    Args:
        module: a converted network.
        inputs: its flat inputs.
        device: where its tensors are.
        rounds: calls to take medians of, after one to warm up.

    Raises:
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"`rounds` (={rounds}) must be 1 or more.")
    bound = bound_graph(module, device)
    geometries = _geometries(module)
    ops = {node.name: biper_op(node) for node in module.graph.nodes}
    seconds: dict[str, list[float]] = {}
    macs: dict[str, int] = {}

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert callable(node.target)
        start = _now(device)
        result = node.target(*args, **kwargs)
        seconds.setdefault(node.name, []).append(_now(device) - start)
        if node.name in geometries:
            n, h, w, _ = args[0].shape
            macs[node.name] = n * geometries[node.name].macs(h, w)
        return result

    for _ in range(rounds + 1):
        interpret(bound, inputs, call)
    rows = [
        NodeProfile(
            name=node.name,
            op=ops[node.name] or _float_name(node),
            backend=_backend(ops[node.name], geometries.get(node.name), device),
            ms=1e3 * statistics.median(seconds[node.name][1:]),
            macs=macs.get(node.name),
        )
        for node in bound.graph.nodes
        if node.op == "call_function" and "getitem" not in str(node.target)
    ]
    batch = len(inputs[0]) if inputs else 0
    return ProfileReport(
        batch=batch, rounds=rounds, threads=torch.get_num_threads(), nodes=tuple(rows)
    )


def _now(device: torch.device | None) -> float:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _geometries(module: fx.GraphModule) -> dict[str, Conv2dGeometry]:
    """Return the geometry of every binary convolution with constant weights, by node name."""
    found = {}
    for node in module.graph.nodes:
        if (biper_op(node) or "").startswith("bconv2d"):
            weight = named_arguments(node)["weight"]
            if weight.op == "get_attr":
                constant = get_constant(module, weight.target)
                found[node.name] = conv_geometry(named_arguments(node), constant)
    return found


def _float_name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def _backend(op: str | None, geometry: Conv2dGeometry | None, device: torch.device | None) -> str:
    return "torch" if op is None else select(op, geometry, device or torch.device("cpu")).name
