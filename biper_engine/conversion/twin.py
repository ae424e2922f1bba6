"""Float forms of a binary network, for speed comparisons with programs without bits."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from biper_engine.conversion.fuse import fuse
from biper_engine.conversion.ir import BinaryConv
from biper_engine.conversion.pipeline import Built, build
from biper_engine.graph.reading import arguments, constant, is_call

__all__ = ["float_twin", "folded_network"]

_LAYERS = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)


def folded_network(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """Return the network in float operators, with constants folded, as for inference.

    Weights are binarized once and not in each call; scales and BatchNorm are folded into the
    convolutions' weights if possible. Signs of activations stay. It computes what the model
    computes in eval mode, up to rounding.

    Args:
        model: takes one tensor; it is not changed.
        images: [N, C, H, W]; the batch is free afterwards, the size is not.

    Returns:
        A graph module that takes images and returns a tuple.

    Raises:
        ConversionError: the model cannot be captured.
    """
    return _folded(_built(model, images))


def float_twin(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """Return the network with float convolutions in place of binary ones.

    It has the same layers, sizes and activations such as hardtanh, but no sign before a binary
    layer: the network that can be deployed if nothing runs on bits. It does the work of a float
    network that was trained instead; its outputs have no meaning. Weights of layers that were
    binary are scaled to a norm of 1/2 per output channel, as in a float network: with a binary
    network's weights, each layer would amplify rounding differences. A sign whose argument is not a
    map of the same shape stays, and so does a sign before a layer that is faster in floats.

    Args:
        model: takes one tensor; it is not changed.
        images: [N, C, H, W]; the batch is free afterwards, the size is not.

    Returns:
        A graph module that takes images and returns a tuple.

    Raises:
        ConversionError: the model cannot be captured.
    """
    built = _built(model, images)
    layers = set()
    named = {node.meta["source"]: node for node in built.float_graph.graph.nodes}
    for node in built.lowered.graph.nodes:
        conv = node.meta.get("conv")
        if not isinstance(conv, BinaryConv) or conv.source is None:
            continue
        sign, source = named[conv.value], named[conv.source]
        if sign is not source and sign.meta["val"].shape == source.meta["val"].shape:
            sign.replace_all_uses_with(source)
            layers.add(conv.layer)
    built.float_graph.graph.eliminate_dead_code()
    twin = _folded(built)
    for node in twin.graph.nodes:
        if is_call(node, *_LAYERS) and node.meta.pop("layer") in layers:
            _scale_weight(twin, node)
    return twin


def _scale_weight(twin: fx.GraphModule, layer: fx.Node) -> None:
    weight = constant(twin, arguments(layer)["weight"])
    if weight is not None:
        norms = weight.flatten(1).norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)
        weight.div_(2 * norms.view(-1, *[1] * (weight.dim() - 1)))


def _built(model: nn.Module, images: Tensor) -> Built:
    return build(model, (images,), keep_float=(), compute_dtype=torch.float32)


def _folded(built: Built) -> fx.GraphModule:
    fuse(built.float_graph)
    graph = fx.Graph()
    graph.output(graph.graph_copy(built.float_graph.graph, {}))
    for node in graph.nodes:  # free the values of the finished trace
        node.meta = {"layer": node.meta.get("layer")} if is_call(node, *_LAYERS) else {}
    return fx.GraphModule(built.float_graph, graph)
