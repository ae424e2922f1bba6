"""Compare a backend with the reference, operator by operator, without a model or a proof."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.converted import BYTES, ConvertedNetwork
from biper_engine.graph.choice import node_backend
from biper_engine.graph.reading import biper_op, interpret
from biper_engine.ops.backends import by_name, forced_name, use_backend
from biper_engine.serialization.execution import call_node, digest, exactly, forced
from biper_engine.serialization.proof import example_inputs
from biper_engine.serialization.reports import BackendReport, NodeReport

__all__ = ["check_backend"]


def check_backend(
    network: ConvertedNetwork,
    backend: str | None = None,
    *,
    inputs: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> BackendReport:
    """Compare a backend with the reference, operator by operator, each on the reference's inputs.

    Args:
        network: any converted network; it needs no proof.
        backend: a name from `biper_engine.backends()`; None takes the engine's choice.
        inputs: the network's flat inputs; None creates them from `seed`.
        seed: see `example_inputs`.

    Returns:
        One row for every `torch.ops.biper` node.

    Raises:
        BackendUnavailableError: `backend` is unknown or cannot run the network.
    """
    if backend is not None:
        by_name(backend)
    device = network.device or torch.device("cpu")
    if inputs is None:
        bound = BYTES if network.proof is None else network.proof.bound
        inputs = example_inputs(network.signature.inputs, seed, bound)
    module, rows = network.graph_module, []

    def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
        op = biper_op(node)
        with forced(backend):
            name = node_backend(module, node, device)
            if op is None or name is None:  # a float operator
                return call_node(node, args, kwargs, prepack=False)
            got = call_node(node, args, kwargs, prepack=True)
        with use_backend("reference"):
            wanted = call_node(node, args, kwargs, prepack=False)
        rows.append(_compare(node.name, op, name, got, wanted))
        return wanted

    with exactly():
        interpret(module, [value.to(device) for value in inputs], call)
    return BackendReport(backend=backend or forced_name() or "automatic", nodes=tuple(rows))


def _compare(node: str, op: str, backend: str, got: Any, wanted: Any) -> NodeReport:
    pairs = list(zip(got, wanted, strict=True)) if isinstance(got, tuple) else [(got, wanted)]
    different, total, largest = 0, 0, 0.0
    for a, b in pairs:
        total += b.numel()
        if a.dtype != b.dtype or a.shape != b.shape:
            different += b.numel()
        elif digest(a) != digest(b):
            different += int((a != b).sum())
            largest = max(largest, float((a.double() - b.double()).abs().max()))
            different = max(different, 1)  # NaN, or -0.0 for 0.0
    return NodeReport(node, op, backend, different, total, largest)
