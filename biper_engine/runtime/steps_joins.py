"""Native steps that put values one after the other, or beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from biper_engine.bits import WORD_BITS
from biper_engine.runtime.placement import Placed, dense_image
from biper_engine.runtime.runs import RunMaps, Unsupported, count_of, leading
from biper_engine.runtime.steps_moves import rank_of, within_image

__all__ = ["HANDLERS", "join"]

Handler = Callable[[RunMaps, fx.Node, dict[str, Any]], None]


def join(run: RunMaps, parts: Sequence[Placed], dim: int) -> Placed:
    """Add a step that puts values one after the other along a dimension."""
    parts = [run.settled(x) for x in parts]
    largest = max(parts, key=lambda x: count_of(x.sizes))
    order = leading([largest], largest.sizes)
    at = order.index(dim)
    first = parts[0].sizes
    count = count_of([first[d] for d in order[:at]])
    inner = count_of([first[d] for d in order[at + 1 :]])
    (made,) = run.emit(
        "join",
        maps=[run.in_order(x, order) for x in parts],
        lengths=[x.sizes[dim] * inner for x in parts],
        count=count,
    )
    total = sum(x.sizes[dim] for x in parts)
    sizes = (*first[:dim], total, *first[dim + 1 :])
    return Placed(made, dense_image(sizes, order))


def _cat(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    parts = [run.flowing(value) for value in named["tensors"]]
    dim = within_image(parts[0], named["dim"])
    if (
        len(set(named["tensors"])) == 1
        and _is_residual(node)
        and parts[0].sizes[dim] % WORD_BITS == 0
    ):
        run.set(node, _repeated(run, parts[0], dim, len(parts)))
    else:
        run.set(node, join(run, parts, dim))


def _is_residual(node: fx.Node) -> bool:
    """Whether binary convolutions add a value, which a copy of it would only slow down."""
    return all(user.kwargs.get("residual") is node for user in node.users)


def _repeated(run: RunMaps, x: Placed, dim: int, count: int) -> Placed:
    """Return a value put after itself `count` times along a dimension, which copies nothing."""
    x = run.settled(x)
    sizes = list(x.sizes)
    sizes[dim] *= count
    image = x.image.unsqueeze(dim)
    image = image.expand(*image.shape[:dim], count, *image.shape[dim + 1 :])
    return replace(x, image=image, shape=tuple(sizes))


def _stack(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    parts = [run.settled(run.flowing(value)) for value in named["tensors"]]
    dim = named["dim"] % (rank_of(parts[0]) + 1)
    if dim == 0:
        raise Unsupported("stacks batches")
    run.set(node, join(run, [x.viewed(x.image.unsqueeze(dim), 0) for x in parts], dim))


HANDLERS: dict[str, Handler] = {"cat": _cat, "stack": _stack}
"""The native steps of joins, by the names of their declarations."""
