"""Native steps of products of matrices on bits, and with binary weights, and of embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.runtime.placement import Placed, constant_of, dense_image, place_map
from biper_engine.runtime.runs import RunMaps, Unsupported, count_of

__all__ = ["HANDLERS"]

Handler = Callable[[RunMaps, fx.Node, dict[str, Any]], None]

_SCALE = ("multiplier", "row_multiplier", "column_multiplier", "bias")


def _bit_matmul(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    if named["dtype"] != torch.float32:
        raise Unsupported(f"writes {named['dtype']}")
    channels, groups = named["channels"], named["groups"]
    a, b = (run.bits(named[name], channels) for name in ("a", "b"))
    images = run.placed(named["a"]).sizes[0]
    (made,) = run.emit(
        "bmatmul",
        a=a,
        b=b,
        groups=groups,
        low_a=named["low_a"],
        low_b=named["low_b"],
        macs=a.height * a.width * b.width * channels,
        **{name: float(named[name]) for name in _SCALE},
    )
    run.set(node, place_map(made, images))


def _weight_linear(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x = run.flowing(named["x"])
    *front, inputs = x.sizes
    held: dict[str, Any] = {name: run.tensor(named[name]) for name in ("weight", "multiplier")}
    held |= {name: run.optional_tensor(named[name]) for name in ("bias", "offset")}
    rows = run.seen(run.natural(x), inputs, count_of(front), 1)
    (made,) = run.emit("weight_linear", x=rows, **held)
    run.set(node, Placed(made, dense_image((*front, made.channels))))


def _constant_rows(weight: Tensor, x: Placed) -> Placed:
    """Return the rows with the numbers of a constant, which may be repeated for each image."""
    if not isinstance(x.source, Tensor):
        raise Unsupported("takes integers that it computes")
    image = x.source.as_strided(x.image.shape, x.image.stride(), x.image.storage_offset())
    return replace(constant_of(weight[image.long()]), batch=x.batch)


def _embedding(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    indices, weight = run.integers(named["indices"]), run.tensor(named["weight"])
    if indices is None:
        run.set(node, _constant_rows(weight, run.settled(run.placed(named["indices"]))))
        return
    rows, channels = weight.shape
    (made,) = run.emit("embedding", x=indices.source, weight=weight, rows=rows)
    run.set(node, Placed(made, dense_image((*indices.sizes, channels))))


HANDLERS: dict[str, Handler] = {
    "biper.bmatmul_float": _bit_matmul,
    "biper.weight_linear": _weight_linear,
    "embedding": _embedding,
}
"""The native steps of this module, by the names of their declarations."""
