"""Weight-only layers: hold binary weights as bits where the input is real.

A linear layer becomes `weight_linear`, which multiplies without unpacking the weights. A
convolution keeps its float operator, whose weights `unpack_weight` makes from bits. This pass comes
after `fuse`, so that BatchNorm is already folded into the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.bits import pack_weight, words
from biper_engine.conversion.weights import BinaryWeight, WeightTerm, analyse_weight
from biper_engine.graph.editing import call, constant_node, substitute
from biper_engine.graph.reading import arguments, constant, is_call
from biper_engine.report import LayerReport

__all__ = ["pack_weights"]

aten = torch.ops.aten
biper = torch.ops.biper


def pack_weights(
    graph_module: fx.GraphModule, rows: Sequence[LayerReport], kept: Sequence[str] = ()
) -> list[LayerReport]:
    """Replace the binary weights of float layers by bits, in place; return the new rows.

    Args:
        graph_module: the graph, fused.
        rows: one report row per operator that multiplies.
        kept: names of layers that keep their float weights.
    """
    binary = {row.name: row for row in rows if row.binary_weight and not row.packed}
    sizes: dict[str, int] = {}
    for node in list(graph_module.graph.nodes):
        name = str(node.meta.get("layer") or node.name)
        if name not in binary or name in kept:
            continue
        if not is_call(node, aten.linear.default, aten.conv2d.default):
            continue
        split = _split(graph_module, node)
        if split is None:
            continue
        replace_layer = _linear if is_call(node, aten.linear.default) else _conv2d
        replace_layer(graph_module, node, name, split)
        sizes[name] = _bits(split.positive) * split.terms
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return [
        replace(row, weights_packed=True, weight_bits_after=sizes[row.name])
        if row.name in sizes
        else row
        for row in rows
    ]


def _split(graph_module: fx.GraphModule, layer: fx.Node) -> BinaryWeight | None:
    """Return the terms of a layer's weight if they take less memory as bits."""
    weight = constant(graph_module, arguments(layer)["weight"])
    if weight is None or weight.dtype != torch.float32:
        return None
    split = analyse_weight(weight)
    if isinstance(split, str) or _bits(split.positive) * split.terms >= 32 * weight.numel():
        return None
    return split


def _bits(positive: Tensor) -> int:
    """Return the bits that a packed weight [O, C, ...] takes."""
    return 32 * words(positive.shape[1]) * positive.numel() // positive.shape[1]


def _terms(split: BinaryWeight) -> list[tuple[WeightTerm, Tensor | None]]:
    """Return what to multiply: terms of +-scale, and the offset that all weights share."""
    first = WeightTerm(split.positive, split.scale)
    if split.second is None:
        return [(first, None)]
    if bool(split.second.positive.all()):
        return [(first, split.second.scale)]
    return [(first, None), (split.second, None)]


# -- layers ---------------------------------------------------------------------------------------


def _linear(graph_module: fx.GraphModule, node: fx.Node, layer: str, split: BinaryWeight) -> None:
    named = arguments(node)
    parts, bias = [], named["bias"]
    for number, (term, offset) in enumerate(_terms(split)):
        weight = pack_weight(term.positive[..., None, None])[:, 0, 0]
        held = [_hold(graph_module, node, value) for value in (weight, term.scale, offset)]
        args = (named["input"], *held[:2], bias if number == 0 else None, held[2])
        part = call(graph_module.graph, node, biper.weight_linear.default, *args, like=node)
        part.meta["layer"] = layer if number == 0 else f"{layer}.second"
        parts.append(part)
    _finish(graph_module, node, parts)


def _conv2d(graph_module: fx.GraphModule, node: fx.Node, layer: str, split: BinaryWeight) -> None:
    parts = []
    for number, (term, offset) in enumerate(_terms(split)):
        middle = torch.zeros_like(term.scale) if offset is None else offset
        values = (pack_weight(term.positive), middle - term.scale, middle + term.scale)
        held = [_hold(graph_module, node, value) for value in values]
        options: dict[str, Any] = {"channels": int(term.positive.shape[1]), "dtype": torch.float32}
        with graph_module.graph.inserting_before(node):
            part = graph_module.graph.call_function(
                biper.unpack_weight.default, tuple(held), options
            )
        made = torch.empty(term.positive.shape, device="meta")
        part.meta = {"layer": f"{layer}.weights" + ".second" * number, "val": made}
        parts.append(part)
    weight = parts[0]
    if len(parts) > 1:
        weight = call(graph_module.graph, node, aten.add.Tensor, *parts, like=parts[0])
        weight.meta = {"val": parts[0].meta["val"]}
    node.update_arg(1, weight)


def _hold(graph_module: fx.GraphModule, before: fx.Node, value: Tensor | None) -> fx.Node | None:
    if value is None:
        return None
    held = value.float() if value.is_floating_point() else value
    return constant_node(graph_module, before, held)


def _finish(graph_module: fx.GraphModule, node: fx.Node, parts: Sequence[fx.Node]) -> None:
    """Put a layer's terms, or their sum, in its place."""
    result = parts[0]
    if len(parts) > 1:
        for part in parts:
            part.meta.pop("source", None)  # no value of the float graph
        result = call(graph_module.graph, node, aten.add.Tensor, *parts, like=node)
        result.meta.pop("layer", None)
    substitute(node, result)
