"""All declared operators, by name and by what runs them."""

from __future__ import annotations

from typing import Any

from torch import fx

from biper_engine.graph import (
    activations,
    arithmetic,
    binary,
    convolutions,
    creation,
    indexing,
    moves,
    pads,
    pools,
    products,
    reductions,
)
from biper_engine.graph.operator import Operator, table

__all__ = ["OPERATORS", "operator_for", "operator_of"]

OPERATORS: dict[str, Operator] = table(
    binary.OPERATORS,
    convolutions.OPERATORS,
    products.OPERATORS,
    pools.OPERATORS,
    reductions.OPERATORS,
    arithmetic.OPERATORS,
    activations.OPERATORS,
    moves.OPERATORS,
    pads.OPERATORS,
    indexing.OPERATORS,
    creation.OPERATORS,
)
"""By name in files."""

_BY_TARGET = {
    target: operator
    for operator in OPERATORS.values()
    for target in (operator.target, *operator.also)
}


def operator_for(target: Any) -> Operator | None:
    """Return the declaration of what an overload runs, or None where there is none."""
    return _BY_TARGET.get(target)


def operator_of(node: fx.Node) -> Operator | None:
    """Return the declaration of what a node calls, or None where there is none."""
    return _BY_TARGET.get(node.target) if node.op == "call_function" else None
