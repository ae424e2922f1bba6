"""Diagonals and triangles of matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import DIM, TENSOR, Kind, integer
from biper_engine.graph.operator import Operator, Rule
from biper_engine.graph.sizes import MisfitError, Size
from biper_engine.graph.values import ANY, Value, axes, require, require_dtype

__all__ = ["OPERATORS"]

_aten = torch.ops.aten

_OFFSET = integer(-(1 << 31))


def _operator(
    name: str, target: Any, arguments: dict[str, Kind], result: Rule, batching: Any = rows.mixes
) -> Operator:
    return Operator(name=name, target=target, arguments=arguments, result=result, rows=batching)


def _moved(x: Value, *shape: Size) -> Value:
    require_dtype("self", x, ANY)
    return Value(x.dtype, shape, limits=x.limits)


def _diagonal(self: Value, offset: int, dim1: int, dim2: int) -> Value:
    first, second = axes((dim1, dim2), self.rank)
    rows_, columns = self.shape[first], self.shape[second]
    if not isinstance(rows_, int) or not isinstance(columns, int):
        raise MisfitError(f"`self` (={self}) has no fixed number of rows and columns")
    length = max(0, min(rows_, columns - offset) if offset >= 0 else min(rows_ + offset, columns))
    rest = (size for at, size in enumerate(self.shape) if at not in (first, second))
    return _moved(self, *rest, length)


def _diagonal_matrices(self: Value, offset: int, dim1: int, dim2: int) -> Value:
    require(self.rank >= 1, "`self` has no dimensions")
    first, second = sorted(axes((dim1, dim2), self.rank + 1))
    length = self.shape[-1] + abs(offset)
    rest = list(self.shape[:-1])
    rest.insert(first, length)
    rest.insert(second, length)
    return _with_zero(_moved(self, *rest))


def _triangle(self: Value, diagonal: int) -> Value:
    require(self.rank >= 2, f"`self` (={self}) is not a matrix")
    return _with_zero(_moved(self, *self.shape))


def _with_zero(x: Value) -> Value:
    limits = None if x.limits is None else (min(x.limits[0], 0), max(x.limits[1], 0))
    return Value(x.dtype, x.shape, limits=limits)


def _matrix_rows(named: Mapping[str, Any], result: Any) -> bool:
    return rows.first_flows(named, result) and result.rank >= 3


OPERATORS: list[Operator] = [
    _operator(
        "diagonal",
        _aten.diagonal.default,
        {"self": TENSOR, "offset": _OFFSET, "dim1": DIM, "dim2": DIM},
        _diagonal,
    ),
    _operator(
        "diagonal_matrices",
        _aten.diag_embed.default,
        {"self": TENSOR, "offset": _OFFSET, "dim1": DIM, "dim2": DIM},
        _diagonal_matrices,
    ),
    *[
        _operator(
            name,
            getattr(_aten, name).default,
            {"self": TENSOR, "diagonal": _OFFSET},
            _triangle,
            _matrix_rows,
        )
        for name in ("tril", "triu")
    ],
]
