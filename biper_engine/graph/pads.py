"""Pads with zeros and other numbers, and with values of the map itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import NUMBER, TENSOR, Kind, integers
from biper_engine.graph.operator import Numbers, Operator, Rule, passing
from biper_engine.graph.sizes import MisfitError, Size
from biper_engine.graph.values import ANY, FLOATS, MAX_RANK, Value, require, require_dtype

__all__ = ["OPERATORS"]

_aten = torch.ops.aten


def _operator(
    name: str, target: Any, arguments: dict[str, Kind], result: Rule, batching: Any
) -> Operator:
    return Operator(name=name, target=target, arguments=arguments, result=result, rows=batching)


def _padded(x: Value, pad: Sequence[int]) -> list[Size]:
    """Return the sizes of `x` with (before, after) for each dimension, the last one first."""
    require(len(pad) % 2 == 0 and len(pad) <= 2 * x.rank, f"`pad` (={list(pad)}) of {x}")
    sizes = list(x.shape)
    for at in range(len(pad) // 2):
        before, after = pad[2 * at], pad[2 * at + 1]
        inner = sizes[-1 - at] + min(before, 0) + min(after, 0)
        require(inner >= 0, f"`pad` (={list(pad)}) cuts more than `self` (={x}) has")
        sizes[-1 - at] = sizes[-1 - at] + before + after
    return sizes


def _pad(self: Value, pad: Sequence[int], value: Any) -> Value:
    require_dtype("self", self, ANY)
    fits = self.dtype.is_floating_point or value in (0, 1)
    require(fits, f"`value` (={value}) for {self}")
    return Value(self.dtype, tuple(_padded(self, pad)))


def _edge_pad(dimensions: int, name: str) -> Rule:
    """Return the rule of a pad of the last dimensions with the map's own values."""

    def rule(self: Value, padding: Sequence[int]) -> Value:
        require_dtype("self", self, FLOATS)
        require(self.rank in (dimensions + 1, dimensions + 2), f"`self` is {self}")
        inner = self.shape[-dimensions:]
        for at, size in enumerate(reversed(inner)):
            if not isinstance(size, int) or size < 1:
                raise MisfitError(f"`self` (={self}) cannot be padded along {size}")
            for pad in padding[2 * at : 2 * at + 2]:
                fits = pad >= 0 and (name == "replication" or pad < size)
                require(fits, f"`padding` (={list(padding)}) of `self` (={self})")
        for size in self.shape[self.rank - dimensions - 1 :]:
            require(size >= 1, f"`self` (={self}) is empty")
        return Value(self.dtype, tuple(_padded(self, padding)))

    return rule


def _edge_pads() -> list[Operator]:
    return [
        _operator(
            f"{name}_pad{dimensions}d",
            getattr(_aten, f"{name}_pad{dimensions}d").default,
            {"self": TENSOR, "padding": integers((2 * dimensions,), 0)},
            _edge_pad(dimensions, name),
            rows.image if dimensions > 1 else _map_of_rows,
        )
        for name in ("reflection", "replication")
        for dimensions in (1, 2, 3)
    ]


def _map_of_rows(named: Mapping[str, Any], result: Any) -> bool:
    return rows.first_flows(named, result) and result.rank >= 3


def _pad_rows(named: Mapping[str, Any], result: Any) -> bool:
    return rows.first_flows(named, result) and len(named["pad"]) < 2 * result.rank


OPERATORS: list[Operator] = [
    *passing(Numbers.MOVED, _edge_pads()),
    _operator(
        "pad",
        _aten.constant_pad_nd.default,
        {"self": TENSOR, "pad": integers(range(0, 2 * MAX_RANK + 1), -(1 << 31)), "value": NUMBER},
        _pad,
        _pad_rows,
    ),
]
