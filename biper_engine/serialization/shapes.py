"""Shapes of a graph that came from a file, checked without computing anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from biper_engine.errors import FileFormatError
from biper_engine.runtime import MISFITS, call_without_data, interpret, without_data
from biper_engine.serialization.graph_format import operator_name

__all__ = ["check_shapes"]


def check_shapes(
    module: fx.GraphModule, inputs: Sequence[tuple[torch.dtype, Sequence[int]]]
) -> None:
    """Run every node on tensors without data, so that misfits show before anything is computed.

    Args:
        module: a decoded graph.
        inputs: dtype and shape of every input.

    Raises:
        FileFormatError: a node's arguments do not fit it; the message names the node.
    """

    def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
        args, kwargs = fx.node.map_aggregate((args, kwargs), without_data)
        try:
            return call_without_data(node.target, args, kwargs)
        except MISFITS as error:
            raise FileFormatError(
                f"Node {node.name!r} ({operator_name(node) or 'item'}) does not fit what it is "
                f"given: {str(error)[:300]}"
            ) from error

    try:
        values = [torch.empty(tuple(s), dtype=d, device="meta") for d, s in inputs]
    except MISFITS as error:
        raise FileFormatError(f"The file's inputs have impossible shapes: {error}.") from error
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        interpret(module, values, call)
