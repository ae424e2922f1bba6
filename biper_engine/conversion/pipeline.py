"""All passes, from a model to a lowered graph and the float graph that it must agree with."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils import _pytree as pytree

from biper_engine.conversion import ir
from biper_engine.conversion.capture import capture
from biper_engine.conversion.finite import require_finite
from biper_engine.conversion.fuse import fuse
from biper_engine.conversion.lower import lower
from biper_engine.conversion.modes import plain_modes
from biper_engine.conversion.products import find_product
from biper_engine.conversion.recognize import KEPT, recognize
from biper_engine.conversion.recurrent import make_recurrent_layers_portable
from biper_engine.conversion.simplify import simplify
from biper_engine.conversion.ties import tied_channels
from biper_engine.conversion.weight_only import pack_weights
from biper_engine.graph.reading import constant, is_call
from biper_engine.metadata import Provenance
from biper_engine.report import LayerReport

__all__ = ["Built", "build"]


@dataclass
class Built:
    """The result of all passes.

    Attributes:
        captured: the captured graph of float operators only, which the engine must reproduce.
        float_graph: the captured graph, simplified. `meta["source"]` of its nodes is the name of
            the captured node with the same value, or of the node itself if there is none.
        lowered: the converted graph; `meta["source"]` of its nodes is as in `float_graph`.
        rows: one report row per operator that multiplies.
        examples: the flat inputs of the trace.
        in_spec: pytree structure of `(args, kwargs)`.
        out_spec: pytree structure of the result.
        dropped_checks: the model's checks of values that only raise, which the engine lacks.
    """

    captured: fx.GraphModule
    float_graph: fx.GraphModule
    lowered: fx.GraphModule
    rows: list[LayerReport]
    examples: tuple[Tensor, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    dropped_checks: tuple[str, ...] = ()


@plain_modes()
def build(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    example_kwargs: dict[str, Any] | None = None,
    keep_float: Sequence[str],
    compute_dtype: torch.dtype,
) -> Built:
    """Run capture, simplify, recognize, fuse and lower on a copy of `model`."""
    captured = capture(model, example_inputs, example_kwargs)
    graph_module = captured.graph_module
    for node in graph_module.graph.nodes:
        node.meta["source"] = node.name
        if str(node.meta.get("layer", "x")).partition("#")[0] == "":
            node.meta["layer"] = node.name  # a functional call in the model's own forward
    before = _LazyGraphModule(graph_module, copy.deepcopy(graph_module.graph))
    _reshape_views(before)
    simplify(graph_module)
    _name_sources(graph_module)
    require_finite(graph_module, model)
    float_graph = _LazyGraphModule(graph_module, copy.deepcopy(graph_module.graph))
    rows = recognize(graph_module, keep_float=keep_float)
    fuse(graph_module)
    kept = [row.name for row in rows if row.reason == KEPT]
    rows = pack_weights(graph_module, rows, kept)
    rows = _with_ties(rows, graph_module)
    lowered = lower(graph_module, compute_dtype)
    make_recurrent_layers_portable(lowered)
    return Built(
        before,
        float_graph,
        lowered,
        rows,
        captured.examples,
        captured.in_spec,
        captured.out_spec,
        captured.dropped_checks,
    )


def _reshape_views(graph_module: fx.GraphModule) -> None:
    """Replace views by reshapes: strides may differ from those of the trace, values do not."""
    views = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target in views:
            node.target = torch.ops.aten.reshape.default
    graph_module.recompile()


def _name_sources(graph_module: fx.GraphModule) -> None:
    """Give every node its own source: of several with the same source, the last has its value."""
    taken = set()
    for node in reversed(graph_module.graph.nodes):
        source = node.meta.get("source")
        if source is None or source in taken:
            node.meta["source"] = node.name
        taken.add(node.meta["source"])


def _with_ties(rows: list[LayerReport], graph_module: fx.GraphModule) -> list[LayerReport]:
    """Return the rows with the ties of layers whose sums go directly into a sign."""
    ties: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if not is_call(node, ir.binary_conv) or len(node.args) > 1:
            continue
        for user in node.users:
            if is_call(user, ir.binarize):
                ties[node.meta["layer"]] = tied_channels(node.meta["conv"], user.meta["rule"])
    return [replace(row, ties=ties.get(row.name, 0)) for row in rows]


def nothing_packed(built: Built, provenance: Provenance) -> str:
    """Return the message for a model without any binary layer."""
    rows = built.rows
    if not rows:
        return (
            "The model has no convolution, no linear layer and no other product, so there is "
            "nothing to pack."
        )
    counts = _counted(rows)
    forgotten = [row for row in rows if "weights are real" in row.reason]
    if forgotten and not _holds_sines(built.float_graph):
        names = ", ".join(row.name for row in forgotten[:3])
        names += f" and {len(forgotten) - 3} more" * (len(forgotten) > 3)
        how_many = forgotten[0].reason.partition("real ")[2].partition(":")[0]
        return (
            f"No binary layer found in {counts}: of {names}, the input is a sign, but weights are "
            f"real {how_many}. Binarise them before `convert`, "
            "as the training code does before each step."
        )
    inner = [row for row in rows if row.binary] or rows[1:] or rows
    example = max(inner, key=lambda row: (row.binary, math.prod(row.shape)))
    is_biper = provenance.architecture is not None or _holds_sines(built.float_graph)
    question = " Is this a stage-1 checkpoint?" if is_biper and provenance.stage != 2 else ""
    return (
        f"No binary layer found in {counts}; {example.name}: {example.reason}."
        f"{question} A layer is packed when its weight takes two values in every output "
        "channel, or -s, 0 and s, and its input is a sign."
    )


def _counted(rows: Sequence[LayerReport]) -> str:
    convolutions = sum(row.kind.startswith("conv") for row in rows)
    linears = sum(row.kind == "linear" for row in rows)
    counted = {
        "convolution": convolutions,
        "linear layer": linears,
        "other product": len(rows) - convolutions - linears,
    }
    return " and ".join(f"{n} {name}{'s' * (n != 1)}" for name, n in counted.items() if n)


def _holds_sines(graph_module: fx.GraphModule) -> bool:
    """Whether a weight is distributed like sines: half of it above 1/sqrt(2), nothing above 1."""
    for node in graph_module.graph.nodes:
        product = find_product(graph_module, node)
        for factor in () if product is None else product.factors:
            held = constant(graph_module, factor.node)
            if held is None or held.numel() < 64 or float(held.abs().max()) > 1:
                continue
            if 0.4 < float((held.abs() > 0.5**0.5).float().mean()) < 0.6:
                return True
    return False
