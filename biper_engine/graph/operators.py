"""All declared operators, by name and by target."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from biper_engine.graph import (
    activations,
    arithmetic,
    binary,
    bit_products,
    convolutions,
    creation,
    indexing,
    matrices,
    moves,
    norms,
    pads,
    pools,
    products,
    recurrent,
    reductions,
    scans,
    special,
    writes,
)
from biper_engine.graph.operator import Numbers, Operator, table

__all__ = ["OPERATORS", "name_of", "numbers_of", "operator_for", "operator_of"]

OPERATORS: dict[str, Operator] = table(
    binary.OPERATORS,
    bit_products.OPERATORS,
    convolutions.OPERATORS,
    products.OPERATORS,
    pools.OPERATORS,
    recurrent.OPERATORS,
    reductions.OPERATORS,
    scans.OPERATORS,
    norms.OPERATORS,
    arithmetic.OPERATORS,
    special.OPERATORS,
    activations.OPERATORS,
    moves.OPERATORS,
    matrices.OPERATORS,
    pads.OPERATORS,
    indexing.OPERATORS,
    writes.OPERATORS,
    creation.OPERATORS,
)
"""All operators, by their names in files."""

_BY_TARGET = {
    target: operator
    for operator in OPERATORS.values()
    for target in (operator.target, *operator.also)
}


def operator_for(target: Any) -> Operator | None:
    """Return the declaration of an overload's operator, or None if there is none."""
    return _BY_TARGET.get(target)


def operator_of(node: fx.Node) -> Operator | None:
    """Return the declaration of the operator that a node calls, or None if there is none."""
    return _BY_TARGET.get(node.target) if node.op == "call_function" else None


def name_of(node: fx.Node) -> str:
    """Return the name of the operator that a node calls: that in files, or PyTorch's."""
    declared = operator_of(node)
    return repr(declared.name if declared is not None else str(node.target))


# Operators of captured graphs, which files do not hold.
_CAPTURED = {
    Numbers.ELEMENTWISE: "square bitwise_left_shift softshrink hardshrink relu6",
    Numbers.MOVED: "native_channel_shuffle",
    Numbers.LARGEST: "max_pool1d max_pool3d",
}

_NUMBERS = {
    getattr(declared.target, "overloadpacket", None): declared.numbers
    for declared in OPERATORS.values()
    if declared.numbers is not None
} | {
    getattr(torch.ops.aten, name): numbers
    for numbers, names in _CAPTURED.items()
    for name in names.split()
}


def numbers_of(node: fx.Node) -> Numbers | None:
    """Return how the numbers of a call's result come from its operands', for any overload."""
    packet = getattr(node.target, "overloadpacket", None)
    return _NUMBERS.get(packet) if node.op == "call_function" else None
