"""The memory of a converted network's tensors: shared results, layouts, and the device."""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload

from biper_engine.graph.reading import arguments, constant, output_values

__all__ = ["align_weights", "create_on", "isolate_outputs"]


def _aliased(node: fx.Node) -> fx.Node | None:
    """Return the node whose memory this one may share, by the operator's schema, or None."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    for argument in node.target._schema.arguments:
        source = arguments(node)[argument.name]
        if argument.alias_info is not None and isinstance(source, fx.Node):
            return source
    return None


def _root(node: fx.Node) -> fx.Node:
    source = _aliased(node)
    while source is not None:
        node, source = source, _aliased(source)
    return node


def isolate_outputs(module: fx.GraphModule) -> None:
    """Clone, in place, every returned value that shares memory with an input or a constant."""
    output = module.graph.output_node()
    values = list(output_values(module.graph))
    clones: dict[fx.Node, fx.Node] = {}
    for position, value in enumerate(values):
        if not isinstance(value, fx.Node) or _root(value).op not in ("placeholder", "get_attr"):
            continue
        if value not in clones:
            with module.graph.inserting_before(output):
                clones[value] = module.graph.create_node(
                    "call_function", torch.ops.aten.clone.default, (value,), name=f"{value}_copy"
                )
        values[position] = clones[value]
    if clones:
        output.args = (tuple(values),)
        module.recompile()


def align_weights(module: fx.GraphModule) -> None:
    """Give the weights of float 2-d convolutions channels_last memory, in place.

    torch then returns channels_last maps also for contiguous images, as binary operators need.
    """
    convolutions = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)
    for node in module.graph.nodes:
        weight = arguments(node)["weight"] if node.target in convolutions else None
        tensor = constant(module, weight)
        if tensor is not None and tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def create_on(module: fx.GraphModule, device: torch.device | None) -> None:
    """Let operators that make tensors from sizes make them on a device, in place; None: the CPU."""
    wanted = device or torch.device("cpu")
    changed = False
    for node in module.graph.nodes:
        if _creates(node) and (node.kwargs.get("device") or torch.device("cpu")) != wanted:
            node.kwargs = {**node.kwargs, "device": wanted}
            changed = True
    if changed:
        module.recompile()


def _creates(node: fx.Node) -> bool:
    """Whether a node calls an operator that takes a device, and no tensor whose device it uses."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    types = {argument.name: str(argument.type) for argument in node.target._schema.arguments}
    return "device" in types and not any("Tensor" in kind for kind in types.values())
