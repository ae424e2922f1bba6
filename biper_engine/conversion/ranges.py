"""Value sets: the numbers that an operator's result can hold, if they are few or have a sign.

`find_steps` follows a value up to one float source. A value that is computed from several binary
values, or moved in ways that bits cannot express, is still binary if it can hold only two numbers.
The numbers are found operator by operator. Elementwise operators are evaluated on every combination
of their operands' numbers.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from biper_engine.graph.operator import Numbers
from biper_engine.graph.operators import numbers_of
from biper_engine.graph.patterns import clamp_limits
from biper_engine.graph.reading import arguments, constant, evaluate, is_call, parent

__all__ = ["created_number", "is_move", "nonnegative", "value_set"]

aten = torch.ops.aten

MOST_VALUES = 4
MOST_OPERANDS = 4
_FIRST_ELEMENTS = 1 << 12

_STEPS = frozenset(
    (aten.sign, aten.sgn, aten.heaviside, aten.copysign, aten.div, aten.round, aten._to_copy)
)
"""Operators that may turn many values into few; comparisons give bools, which are always few."""

_CREATED: dict[object, Callable[[dict[str, Any]], float]] = {
    **{aten_op: lambda _: 0.0 for aten_op in (aten.zeros, aten.zeros_like, aten.new_zeros)},
    **{aten_op: lambda _: 1.0 for aten_op in (aten.ones, aten.ones_like, aten.new_ones)},
    **{aten_op: lambda n: n["fill_value"] for aten_op in (aten.full, aten.full_like)},
}
"""Operators that fill a tensor with one number."""

_NEVER_NEGATIVE = frozenset(
    (aten.relu, aten.relu6, aten.abs, aten.sigmoid, aten.hardsigmoid, aten.exp, aten._softmax)
)
_PICKS = frozenset(
    (aten.index, aten._unsafe_index, aten.index_select, aten.gather, aten.take, aten.embedding)
)
"""Operators whose result has elements of the first operand, wherever the input says."""

_AVERAGES = frozenset(
    (aten.avg_pool1d, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.mean, aten.sum)
)

ValueSet = frozenset[float]
Steps = Callable[[fx.Node], ValueSet | None]


def packet(node: fx.Node) -> object:
    """Return the operator of a call, for any overload; None for other nodes."""
    return getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None


def is_move(node: fx.Node) -> bool:
    """Whether a call moves, repeats or drops values of its first argument, at fixed places."""
    if numbers_of(node) is not Numbers.MOVED:
        return False
    others = [other for other in node.all_input_nodes if other is not node.args[0]]
    return all(other.op == "get_attr" or is_call(other, aten.sym_size.int) for other in others)


def created_number(node: fx.Node) -> float | None:
    """Return the number that fills the result of a call, or None for any other call."""
    make = _CREATED.get(packet(node))
    return None if make is None else make(arguments(node))


def nonnegative(node: fx.Node) -> bool:
    """Whether a value is at least 0 for every input."""
    kind = packet(node)
    if kind in _NEVER_NEGATIVE:
        return True
    limits = clamp_limits(node)
    if limits is not None:  # the upper one wins if they cross
        return limits[1] >= 0 and (limits[0] >= 0 or nonnegative(parent(node)))
    if is_call(node, aten.constant_pad_nd.default):
        return (arguments(node)["value"] or 0) >= 0 and nonnegative(parent(node))
    if numbers_of(node) is Numbers.LARGEST or kind in _AVERAGES or is_move(node):
        return nonnegative(parent(node))
    if numbers_of(node) is Numbers.JOINED:
        return all(nonnegative(part) for part in arguments(node)["tensors"])
    if is_call(node, aten.add.Tensor, aten.mul.Tensor) and arguments(node).get("alpha", 1) == 1:
        return all(_is_nonnegative(operand) for operand in node.args[:2])
    return False


def _is_nonnegative(operand: object) -> bool:
    if isinstance(operand, fx.Node):
        return nonnegative(operand)
    return isinstance(operand, (int, float)) and operand >= 0


def value_set(graph_module: fx.GraphModule, node: fx.Node, steps: Steps) -> ValueSet | None:
    """Return the numbers that a value can hold, or None if they are many or unknown.

    Args:
        graph_module: the graph, simplified.
        node: the value.
        steps: returns the numbers of a value that is a step of a float map, or None.

    Returns:
        A superset of the numbers: operands are treated as independent of each other.
    """
    known: dict[fx.Node, ValueSet | None] = {}

    def find(value: fx.Node) -> ValueSet | None:
        if value not in known:
            found = _values(graph_module, value, find)
            if found is None and packet(value) in _STEPS and value is not node:
                found = steps(value)
            if found is None and _is_bool(value):
                found = frozenset((0.0, 1.0))
            known[value] = None if found is None or len(found) > MOST_VALUES else found
        return known[value]

    return find(node)


def _is_bool(node: fx.Node) -> bool:
    return getattr(node.meta.get("val"), "dtype", None) == torch.bool


def _values(
    graph_module: fx.GraphModule,
    node: fx.Node,
    find: Callable[[fx.Node], ValueSet | None],
) -> ValueSet | None:
    held = constant(graph_module, node)
    if held is not None:
        return _numbers(held)
    number = created_number(node)
    if number is not None:
        return frozenset([float(number)])
    if is_call(node, operator.getitem) and numbers_of(parent(node)) is Numbers.SPLIT:
        return find(parent(parent(node)))
    numbers = numbers_of(node)
    if is_move(node) or numbers is Numbers.LARGEST or packet(node) in _PICKS:
        return find(parent(node))
    if numbers is Numbers.JOINED:
        return _union([find(part) for part in arguments(node)["tensors"]])
    if is_call(node, aten.constant_pad_nd.default):
        return _union([find(parent(node)), frozenset([float(arguments(node)["value"] or 0)])])
    if is_call(node, aten.im2col.default):
        padded = any(arguments(node)["padding"])
        return _union([find(parent(node)), frozenset([0.0] if padded else [])])
    if is_call(node, aten.argmax.default, aten.argmin.default):
        return _positions(node)
    if numbers is Numbers.ELEMENTWISE:
        return _combined(graph_module, node, find)
    return None


def _union(parts: list[ValueSet | None]) -> ValueSet | None:
    known = [part for part in parts if part is not None]
    return frozenset().union(*known) if len(known) == len(parts) else None


def _positions(node: fx.Node) -> ValueSet | None:
    dim = arguments(node)["dim"]
    size = None if dim is None else parent(node).meta["val"].shape[dim]
    if not isinstance(size, int) or size > MOST_VALUES:
        return None
    return frozenset(float(index) for index in range(size))


def _combined(
    graph_module: fx.GraphModule,
    node: fx.Node,
    find: Callable[[fx.Node], ValueSet | None],
) -> ValueSet | None:
    """Evaluate an elementwise operator on every combination of its operands' numbers."""
    operands = [value for value in node.all_input_nodes if "val" in value.meta]
    if len(operands) != len(node.all_input_nodes) or not 0 < len(operands) <= MOST_OPERANDS:
        return None
    sets = []
    for operand in operands:
        numbers = find(operand) if isinstance(operand.meta["val"], torch.Tensor) else None
        if numbers is None:
            return None
        sets.append(sorted(numbers))
    columns = zip(*itertools.product(*sets), strict=True)
    probes = {
        operand: torch.tensor(column, dtype=torch.float64).to(operand.meta["val"].dtype)
        for operand, column in zip(operands, columns, strict=True)
    }
    try:
        result = evaluate(node, probes)
    except (RuntimeError, TypeError, ValueError):  # its other arguments have the real shape
        return None
    if result.shape != next(iter(probes.values())).shape:
        return None
    return _numbers(result)


def _numbers(tensor: torch.Tensor) -> ValueSet | None:
    """Return the numbers in a tensor, or None if they are many."""
    if tensor.numel() > _FIRST_ELEMENTS and _numbers(tensor.flatten()[:_FIRST_ELEMENTS]) is None:
        return None  # without a sort of them all
    unique = torch.unique(tensor)  # type: ignore[no-untyped-call, unused-ignore]
    if unique.is_complex() or len(unique) > MOST_VALUES:
        return None
    return frozenset(float(value) for value in unique.tolist())
