"""Merge binary convolutions of the same bits whose results are concatenated into one.

What follows the concatenation then goes into the epilogue of that one, and its input is read once.
A residual of the merged convolution is the concatenation of theirs: of one map with itself if all
add the same map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from biper_engine.conversion import ir
from biper_engine.conversion.ir import BinaryConv
from biper_engine.graph.editing import call, substitute
from biper_engine.graph.patterns import only_user
from biper_engine.graph.reading import arguments, is_call, shape
from biper_engine.ops.epilogue import Epilogue

__all__ = ["merge"]

aten = torch.ops.aten


def merge(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Merge a binary convolution with those that it is concatenated with; return the new node.

    Return None if they differ in more than weights, parameters of the epilogue and residuals.
    """
    joined = only_user(node)
    if joined is None or not is_call(joined, aten.cat.default) or len(shape(joined)) != 4:
        return None
    named = arguments(joined)
    parts: list[fx.Node] = list(named["tensors"])
    if named["dim"] % 4 != 1 or len(set(parts)) != len(parts) or not _alike(parts):
        return None
    convs: list[BinaryConv] = [part.meta["conv"] for part in parts]
    args = [node.args[0]]
    residuals = [part.args[1] for part in parts if len(part.args) > 1]
    if residuals:
        added = call(graph_module.graph, joined, aten.cat.default, residuals, 1, like=joined)
        added.meta.pop("source", None)  # no value of the float graph
        added.meta.pop("layer", None)
        args.append(added)
    new = call(graph_module.graph, joined, ir.binary_conv, *args, like=joined)
    new.meta |= {"conv": _merged(convs), "layer": parts[0].meta["layer"]}
    substitute(joined, new)
    for part in parts:
        graph_module.graph.erase_node(part)
    return new


def _alike(parts: Sequence[fx.Node]) -> bool:
    """Whether nodes are convolutions that differ in outputs only, and that nothing else uses."""
    if not all(is_call(part, ir.binary_conv) and only_user(part) for part in parts):
        return False
    first, *others = parts
    return first.meta["conv"].geometry.groups == 1 and all(
        part.args[0] is first.args[0]
        and len(part.args) == len(first.args)
        and _common(part) == _common(first)
        and all(_is_value(added) for added in part.args[1:])
        for part in (first, *others)
    )


def _is_value(residual: Any) -> bool:
    """Whether a residual is a value of the model, which verification knows."""
    return "source" in residual.meta


def _common(part: fx.Node) -> tuple[Any, ...]:
    conv: BinaryConv = part.meta["conv"]
    e = conv.epilogue
    geometry = replace(conv.geometry, out_channels=1)
    return geometry, conv.value, conv.rows, e.steps(), e.pool, e.clamp_min, e.clamp_max


def _merged(convs: Sequence[BinaryConv]) -> BinaryConv:
    first = convs[0]
    epilogues = [conv.epilogue.tensors() for conv in convs]
    vectors: dict[str, Any] = {
        name: torch.cat([e[name] for e in epilogues]) for name in epilogues[0]
    }
    outputs = sum(conv.geometry.out_channels for conv in convs)
    epilogue: Epilogue = replace(first.epilogue, **vectors)
    return replace(
        first,
        geometry=replace(first.geometry, out_channels=outputs),
        positive=torch.cat([conv.positive for conv in convs]),
        epilogue=epilogue,
    )
