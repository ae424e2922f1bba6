"""Operators on values whose batch is not the first dimension, as [T, N, C] in attention.

Steps take values whose first dimension is the batch. An operator that computes each image from that
image alone computes the same if the batch of all its operands and of its result is moved to the
front. Only strides change, so this moves no numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from biper_engine.graph.operator import Operator
from biper_engine.graph.rows import elementwise
from biper_engine.runtime.placement import Placed
from biper_engine.runtime.runs import Unsupported

__all__ = ["back", "moved_arguments", "moves_batch", "to_front"]

_OVER_DIMS = ("softmax", "log_softmax", "mean", "sum", "amax", "amin", "logsumexp", "norm")
_LAST_DIMS = ("linear", "layer_norm")


def moves_batch(declared: Operator) -> bool:
    """Whether an operator computes the same if the batch is moved to the front."""
    return declared.rows is elementwise or declared.name in (*_OVER_DIMS, *_LAST_DIMS)


def to_front(x: Any, batch: int, rank: int) -> Any:
    """Move a dimension of an operand, which is broadcast to `rank` dimensions, to the front.

    Args:
        x: a value of the program, or a constant.
        batch: the dimension of the result.
        rank: the dimensions of the result.
    """
    if isinstance(x, Tensor):
        new = rank - x.dim()
        return x if new > batch else x.reshape((1,) * new + x.shape).movedim(batch, 0)
    new = rank - len(x.sizes)
    if x.batch is None or x.shape is not None or x.batch + new != batch:
        raise Unsupported("has operands that are not of one batch")
    image = x.image[(None,) * new].movedim(batch, 0)
    return x.viewed(image, 0)


def back(x: Placed, batch: int) -> Placed:
    """Move the first dimension of a result to where the batch belongs."""
    return x.viewed(x.image.movedim(0, batch), batch)


def moved_arguments(
    declared: Operator, named: Mapping[str, Any], batch: int, rank: int
) -> tuple[dict[str, Any], int]:
    """Return an operator's arguments with the batch in front, and the batch of its result.

    Raises:
        Unsupported: the operator mixes the batch.
    """
    if declared.name in _LAST_DIMS:
        count = len(named.get("normalized_shape", (1,)))
        if batch >= rank - count:
            raise Unsupported("mixes the batch")
        return dict(named), batch
    if declared.name not in _OVER_DIMS:
        return dict(named), batch
    given = named["dim"]
    dims = [given] if isinstance(given, int) else list(given or range(rank))
    dims = [dim % rank for dim in dims]
    if batch in dims:
        raise Unsupported("reduces the batch")
    moved = [dim + 1 if dim < batch else dim for dim in dims]
    gone = "keepdim" in named and not named["keepdim"]
    after = batch - gone * sum(dim < batch for dim in dims)
    return {**named, "dim": moved[0] if isinstance(given, int) else moved}, after
