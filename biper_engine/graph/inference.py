"""Infer what is known about every value of a network before anything is computed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from biper_engine.graph.operator import Result
from biper_engine.graph.operators import operator_of
from biper_engine.graph.reading import constant
from biper_engine.graph.signature import InputSpec
from biper_engine.graph.sizes import BATCH, MisfitError
from biper_engine.graph.values import Value

__all__ = ["input_value", "network_values"]


def input_value(taken: InputSpec) -> Value:
    """Return the value of an input.

    Raises:
        MisfitError: the value is too large.
    """
    return Value(taken.dtype, tuple(BATCH if size is None else size for size in taken.shape))


def network_values(
    module: fx.GraphModule, inputs: Iterable[InputSpec]
) -> dict[fx.Node, Result | None]:
    """Return the value of every node; None if no declaration gives it.

    Args:
        module: a converted network. The contents of its constants are not read.
        inputs: its inputs, in the order of its placeholders.
    """
    values: dict[fx.Node, Result | None] = {}
    taken = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = input_value(next(taken))
        elif node.op == "get_attr":
            held = constant(module, node)
            values[node] = None if held is None else Value.of_constant(held, open=False)
        elif node.op == "call_function":
            values[node] = _result(node, values)
    return values


def _result(node: fx.Node, values: Mapping[fx.Node, Result | None]) -> Result | None:
    if any(values[source] is None for source in node.all_input_nodes):
        return None
    if node.target is operator.getitem:
        source, index = node.args
        several = values[source]  # type: ignore[index]
        return several[index] if isinstance(several, tuple) else None  # type: ignore[index]
    declared = operator_of(node)
    if declared is None:
        return None
    known: Any = values.__getitem__
    given: dict[str, Any] = {
        name: fx.node.map_arg(value, known)
        for name, value in declared.named(node).items()
        if not declared.is_elsewhere(name, value)
    }
    try:
        return declared.infer(given)
    except MisfitError:
        return None
