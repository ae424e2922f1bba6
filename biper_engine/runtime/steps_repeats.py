"""Native steps of values that repeat numbers: expanded, repeated, or the same in each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from biper_engine.graph.shapes import BATCH
from biper_engine.runtime.runs import RunMaps, Unsupported
from biper_engine.runtime.steps_moves import shape_of, taken

__all__ = ["HANDLERS"]

Handler = Callable[[RunMaps, fx.Node, dict[str, Any]], None]


def _batch_in(sizes: Sequence[Any]) -> int:
    """Return the dimension whose size is computed from the batch."""
    computed = [dim for dim, size in enumerate(sizes) if isinstance(size, fx.Node)]
    if len(computed) != 1:
        raise Unsupported("makes a constant of a computed size")
    return computed[0]


def _for_one(wanted: Sequence[int], batch: int) -> tuple[int, ...]:
    """Return the shape for one image."""
    if wanted[batch] % BATCH:
        raise Unsupported("makes a constant of a computed size")
    return (*wanted[:batch], wanted[batch] // BATCH, *wanted[batch + 1 :])


def _expand(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, wanted, sizes = run.placed(named["self"]), shape_of(run, node), named["size"]
    if x.packed:
        raise Unsupported("expands a packed map")
    if x.batch is None:  # a constant for each image
        batch = _batch_in(sizes)
        run.set(node, x.viewed(x.image.expand(_for_one(wanted, batch)), batch))
        return
    batch = len(sizes) - len(x.sizes) + x.batch
    if type(sizes[batch]) is int and sizes[batch] != -1:
        raise Unsupported("has a batch of one size alone")
    settled = run.settled(x)
    shape = (*wanted[:batch], x.sizes[x.batch], *wanted[batch + 1 :])
    run.set(node, settled.viewed(settled.image.expand(shape), batch))


def _repeat(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    times, wanted = named["repeats"], shape_of(run, node)
    x = run.numbers(named["self"])
    if x.batch is None:  # a constant for each image
        batch = _batch_in(times)
        tensor = run.tensor(named["self"])
        first = tensor.shape[batch + tensor.dim() - len(times)] if tensor.dim() else 1
        count = _for_one(wanted, batch)[batch] // max(first, 1)
        repeated = tensor.repeat(*times[:batch], count, *times[batch + 1 :])
        run.set(node, replace(run.of_constant(repeated), batch=batch))
        return
    if len(times) != len(x.sizes) or times[0] != 1:
        raise Unsupported("repeats the batch")
    again = {d: [*range(x.sizes[d])] * count for d, count in enumerate(times) if count != 1}
    run.set(node, taken(run, x, again) if again else x)


def _filled(number: float | str) -> Handler:
    """Return the handler of an operator that makes one number everywhere, for each image."""

    def handler(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
        wanted = shape_of(run, node)
        if run.expected(node).dtype != torch.float32:
            raise Unsupported(f"makes {run.expected(node).dtype}")
        like = named.get("self") if "size" not in named else None
        batch = _batch_in(named["size"]) if like is None else run.placed(like).batch
        if batch is None:
            raise Unsupported("makes a constant of a computed size")
        value = named[number] if isinstance(number, str) else number
        one = run.of_constant(torch.tensor(float(value)))
        run.set(node, one.viewed(one.image.expand(_for_one(wanted, batch)), batch))

    return handler


HANDLERS: dict[str, Handler] = {
    "expand": _expand,
    "repeat": _repeat,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _filled(0.0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(1.0)),
    **dict.fromkeys(("full", "full_like", "new_full"), _filled("fill_value")),
    "fill": _filled("value"),
}
"""The native steps of repeated numbers, by the names of their declarations."""
