"""The passes in a row, from a model to a lowered graph with the float graph it must agree with."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from biper_engine.conversion.capture import capture
from biper_engine.conversion.fuse import fuse
from biper_engine.conversion.lower import lower
from biper_engine.conversion.modes import plain_modes
from biper_engine.conversion.recognize import recognize
from biper_engine.conversion.simplify import simplify
from biper_engine.report import LayerReport

__all__ = ["Built", "build"]


@dataclass
class Built:
    """The result of all passes.

    Attributes:
        captured: the graph as it was captured, float operators only: what the engine must compute.
        float_graph: the same, simplified. `meta["source"]` of its nodes names the captured node
            with the same value, or the node itself where there is none.
        lowered: the converted graph; `meta["source"]` of its nodes is that of `float_graph`.
        rows: one report row per convolution and linear layer.
        examples: the flat inputs of the trace.
        in_spec: pytree structure of `(args, kwargs)`.
        out_spec: pytree structure of the result.
    """

    captured: fx.GraphModule
    float_graph: fx.GraphModule
    lowered: fx.GraphModule
    rows: list[LayerReport]
    examples: tuple[Tensor, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec


@plain_modes()
def build(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    example_kwargs: dict[str, Any] | None = None,
    keep_float: Sequence[str],
    zero_weights: str,
    compute_dtype: torch.dtype,
) -> Built:
    """Run capture, simplify, recognize, fuse and lower on a copy of `model`."""
    captured = capture(model, example_inputs, example_kwargs)
    graph_module = captured.graph_module
    for node in graph_module.graph.nodes:
        node.meta["source"] = node.name
        if str(node.meta.get("layer", "x")).partition("#")[0] == "":
            node.meta["layer"] = node.name  # a functional call in the outermost forward
    before = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    simplify(graph_module)
    _name_sources(graph_module)
    float_graph = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    rows = recognize(graph_module, keep_float=keep_float, zero_weights=zero_weights)
    fuse(graph_module)
    lowered = lower(graph_module, compute_dtype)
    return Built(
        before,
        float_graph,
        lowered,
        rows,
        captured.examples,
        captured.in_spec,
        captured.out_spec,
    )


def _name_sources(graph_module: fx.GraphModule) -> None:
    """Give every node one source: of several with the same one, the last has its value."""
    taken = set()
    for node in reversed(graph_module.graph.nodes):
        source = node.meta.get("source")
        if source is None or source in taken:
            node.meta["source"] = node.name
        taken.add(node.meta["source"])


def nothing_packed(rows: Sequence[LayerReport], stage: int | None) -> str:
    """Return the message for a model without a single binary layer."""
    if not rows:
        return "The model has no convolution and no linear layer, so there is nothing to pack."
    convolutions = sum(row.kind == "conv2d" for row in rows)
    linears = len(rows) - convolutions
    counts = [f"{convolutions} convolution{'s' * (convolutions != 1)}"] if convolutions else []
    counts += [f"{linears} linear layer{'s' * (linears != 1)}"] if linears else []
    inner = [row for row in rows if row.binary] or rows[1:] or rows
    example = max(inner, key=lambda row: (row.binary, math.prod(row.shape)))
    question = "" if stage == 2 else " Is this a stage-1 checkpoint?"
    return (
        f"No binary layer found in {' and '.join(counts)}; {example.name}: {example.reason}."
        f"{question} A layer is packed when its weight takes two values in every output "
        "channel and its input is a sign."
    )
