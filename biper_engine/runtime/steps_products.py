"""Native steps of products of matrices, and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from biper_engine.ops.cpu_program import Map
from biper_engine.runtime.placement import Placed, constant_of, dense_image
from biper_engine.runtime.runs import RunMaps, Unsupported, count_of
from biper_engine.runtime.steps_arithmetic import apply, number
from biper_engine.runtime.steps_maps import add_linear
from biper_engine.runtime.steps_rows import softmax

__all__ = ["HANDLERS"]

Handler = Callable[[RunMaps, fx.Node, dict[str, Any]], None]


def _product(run: RunMaps, a: Placed, b: Placed) -> Placed:
    """Add the products of matrices `a` [..., M, K] and `b` [..., K, N]."""
    *front, rows, depth = a.sizes
    columns = b.sizes[-1]
    matrices: list[Map] = [run.natural(x) for x in (a, b)]
    (made,) = run.emit(
        "matmul",
        a=matrices[0],
        b=matrices[1],
        count=count_of(front),
        rows=rows,
        columns=columns,
        depth=depth,
    )
    return Placed(made, dense_image((*front, rows, columns)))


def _batch_matmul(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    a, b = run.flowing(named["self"]), run.flowing(named["mat2"])
    if a.sizes[0] != b.sizes[0]:
        raise Unsupported("has operands that are not of one batch")
    run.set(node, _product(run, a, b))


def _add_batch_matmul(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    a, b = run.flowing(named["batch1"]), run.flowing(named["batch2"])
    added = run.numbers(named["self"])
    if a.sizes[0] != b.sizes[0]:
        raise Unsupported("has operands that are not of one batch")
    made = _product(run, a, b)
    if named["alpha"] != 1:
        made = apply(run, "multiply", made, number(named["alpha"]))
    run.set(node, apply(run, "add_product", made, added, number(named["beta"])))


def _matmul(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, weight = run.flowing(named["self"]), run.tensor(named["mat2"])
    run.set(node, add_linear(run, x, weight.T, None))


def _add_matmul(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, weight, bias = run.flowing(named["mat1"]), run.tensor(named["mat2"]), named["self"]
    vector = run.tensor(bias)
    if vector.dim() > 1 and vector.shape[0] != 1:
        raise Unsupported("adds a constant to a batch of one size")
    scaled = (weight.double() * named["alpha"]).float()
    added = (vector.double() * named["beta"]).float().expand(1, weight.shape[1]).flatten()
    run.set(node, add_linear(run, x, scaled.T, added))


def _attention(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    """Softmax of the scaled products of queries and keys, times the values."""
    if any(user.args[1] != 0 for user in node.users):
        raise Unsupported("returns its statistics")
    query, key, value = (run.flowing(named[name]) for name in ("query", "key", "value"))
    if len({x.sizes[:-2] for x in (query, key, value)}) > 1:
        raise Unsupported("has several queries for each key")
    mask = None if named["attn_mask"] is None else run.numbers(named["attn_mask"])
    if mask is not None and mask.batch is None and len(mask.sizes) == 4 and mask.sizes[0] != 1:
        raise Unsupported("has a mask for a batch of one size")
    scale = named["scale"] if named["scale"] is not None else query.sizes[-1] ** -0.5
    key = run.settled(key)
    turned = key.viewed(key.image.transpose(-1, -2), 0)
    scores = apply(run, "multiply", _product(run, query, turned), number(scale))
    if named["is_causal"]:
        allowed = torch.ones(scores.sizes[-2:], dtype=torch.bool).tril()
        hidden = torch.zeros(scores.sizes[-2:]).masked_fill(~allowed, float("-inf"))
        scores = apply(run, "add", scores, constant_of(hidden))
    if mask is not None:
        scores = apply(run, "add", scores, mask)
    run.set(node, (_product(run, softmax(run, scores, -1), value), None))


HANDLERS: dict[str, Handler] = {
    "batch_matmul": _batch_matmul,
    "add_batch_matmul": _add_batch_matmul,
    "matmul": _matmul,
    "add_matmul": _add_matmul,
    "attention": _attention,
}
"""The native steps of products, by the names of their declarations."""
