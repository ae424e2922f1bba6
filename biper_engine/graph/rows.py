"""Batching rules: whether an operator computes the rows of a batch independently.

A rule takes an operator's arguments by name, and its result, whose first dimension is the batch. A
value of the network that is the same in every call is a constant; any other value flows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from biper_engine.graph.sizes import BATCH
from biper_engine.graph.values import Value

__all__ = [
    "RowsRule",
    "all_flow",
    "cat",
    "elementwise",
    "first_flows",
    "image",
    "is_batch",
    "mixes",
    "over_dims",
    "unless_first",
]

RowsRule = Callable[[Mapping[str, Any], Any], bool]


def is_batch(value: Any) -> bool:
    """Whether the first dimension of a value, or of each of several, is the batch."""
    results = value if isinstance(value, tuple) else (value,)
    return all(isinstance(x, Value) and x.shape[:1] == (BATCH,) for x in results)


def _flat(named: Mapping[str, Any]) -> Iterable[Any]:
    for value in named.values():
        yield from value if isinstance(value, list | tuple) else (value,)


def mixes(named: Mapping[str, Any], result: Any) -> bool:
    """Return False: rows may depend on each other."""
    return False


def elementwise(named: Mapping[str, Any], result: Any) -> bool:
    """Require flowing values of the same rank, and constants that are the same for every row."""
    rank = result[0].rank if isinstance(result, tuple) else result.rank
    for value in _flat(named):
        if not isinstance(value, Value):
            continue
        if value.flows and (value.rank != rank or value.shape[0] != BATCH):
            return False
        if value.rank > rank or (value.rank == rank and not value.flows and value.shape[0] != 1):
            return False
    return True


def first_flows(named: Mapping[str, Any], result: Any) -> bool:
    """Require that the first operand is the batch, and that no other operand flows."""
    first, *rest = [value for value in _flat(named) if isinstance(value, Value)]
    return first.flows and is_batch(first) and not any(value.flows for value in rest)


def image(named: Mapping[str, Any], result: Any) -> bool:
    """Require a batch whose rows have their own shape."""
    first = next(iter(named.values()))
    return first_flows(named, result) and first.rank >= 3


def over_dims(named: Mapping[str, Any], result: Any) -> bool:
    """Require dimensions other than the first."""
    first, dims = next(iter(named.values())), named["dim"]
    listed = list(dims) if isinstance(dims, list | tuple) else [dims]
    return (
        first_flows(named, result)
        and bool(listed)
        and all(isinstance(d, int) and d % first.rank != 0 for d in listed)
    )


def unless_first(named: Mapping[str, Any], result: Any) -> bool:
    """Require that the dimension of the result is not the first."""
    rank = result[0].rank if isinstance(result, tuple) else result.rank
    return first_flows(named, result) and bool(named["dim"] % rank != 0)


def cat(named: Mapping[str, Any], result: Any) -> bool:
    """Require that batches are joined, along a dimension other than the first."""
    return all(x.flows and is_batch(x) for x in named["tensors"]) and bool(
        named["dim"] % result.rank != 0
    )


def all_flow(named: Mapping[str, Any], result: Any) -> bool:
    """Require that all operands are batches."""
    return all(
        value.flows and is_batch(value) for value in _flat(named) if isinstance(value, Value)
    )
