"""Recurrent layers in a form that runs on every processor.

PyTorch captures an LSTM on the CPU as one call of oneDNN for each layer and direction. Only builds
with oneDNN have that operator, and it reads memory without looking at strides. `aten.lstm` calls it
where it is, and computes the same.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from biper_engine.graph.editing import call
from biper_engine.graph.reading import arguments, is_call

__all__ = ["make_recurrent_layers_portable"]

aten = torch.ops.aten

_LSTM = 2
"""The `mode` of an LSTM."""


def make_recurrent_layers_portable(graph_module: fx.GraphModule) -> None:
    """Replace oneDNN's LSTM by PyTorch's, in place."""
    fused = getattr(aten, "mkldnn_rnn_layer", None)
    changed = False
    for node in list(graph_module.graph.nodes):
        if fused is not None and is_call(node, fused.default) and _is_replaceable(node):
            _replace(graph_module.graph, node)
            changed = True
    if changed:
        graph_module.graph.lint()
        graph_module.recompile()


def _is_replaceable(node: fx.Node) -> bool:
    named = arguments(node)
    usual = named["mode"] == _LSTM and named["num_layers"] == 1 and not named["batch_sizes"]
    items = all(is_call(user, operator.getitem) and user.args[1] < 3 for user in node.users)  # type: ignore[operator]
    return usual and items and not (named["bidirectional"] or named["train"])


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    named = arguments(node)
    x: Any = named["input"]
    if named["reverse"]:
        x = call(graph, node, aten.flip.default, x, [0], like=node)
        x.meta.pop("source", None)  # a value that the captured graph has not
    state = [named["hx_"], named["cx_"]]
    count = 4 if named["has_biases"] else 2
    weights = [named[f"weight{index}"] for index in range(count)]
    options = (named["has_biases"], 1, 0.0, False, False, False)
    layer = call(graph, node, aten.lstm.input, x, state, weights, *options, like=node)
    for user in list(node.users):
        index: Any = user.args[1]
        item = call(graph, user, operator.getitem, layer, index, like=user)
        if index == 0 and named["reverse"]:
            item.meta.pop("source", None)
            item = call(graph, user, aten.flip.default, item, [0], like=user)
        user.replace_all_uses_with(item)
        graph.erase_node(user)
    graph.erase_node(node)
