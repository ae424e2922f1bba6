"""Native steps of what only moves numbers: views where strides allow, else copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.graph.patterns import zero_pad
from biper_engine.graph.shapes import BATCH
from biper_engine.runtime.placement import (
    Placed,
    batch_after_reshape,
    dense_image,
    memory_order,
    place_map,
    reshaped,
)
from biper_engine.runtime.runs import RunMaps, Unsupported

__all__ = ["HANDLERS", "rank_of", "shape_of", "taken", "within_image", "zero_channels"]

Handler = Callable[[RunMaps, fx.Node, dict[str, Any]], None]
View = Callable[[Tensor, dict[str, Any]], Tensor]
Moved = Callable[[Placed, dict[str, Any]], int]


def shape_of(run: RunMaps, node: fx.Node) -> tuple[int, ...]:
    """Return the sizes of a node's value for BATCH images."""
    return tuple(run.expected(node).shape)


# -- views -----------------------------------------------------------------------------------------


def _moving(value: Placed) -> Placed:
    """Refuse a packed map and a constant."""
    if value.packed or value.batch is None:
        raise Unsupported("moves what is no float value")
    return value


def _view(view: View, batch_of: Moved) -> Handler:
    """Return the handler of an operator that PyTorch makes a view."""

    def handler(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
        x = _moving(run.placed(named["self"]))
        batch = batch_of(x, named)
        settled = run.settled(x)
        run.set(node, settled.viewed(view(settled.image, named), batch))

    return handler


def rank_of(x: Placed) -> int:
    """Return the number of dimensions."""
    return len(x.sizes)


def _permuted_batch(x: Placed, named: dict[str, Any]) -> int:
    assert x.batch is not None
    dims: list[int] = [dim % rank_of(x) for dim in named["dims"]]
    return dims.index(x.batch)


def _unsqueezed_batch(x: Placed, named: dict[str, Any]) -> int:
    assert x.batch is not None
    return x.batch + int(named["dim"] % (rank_of(x) + 1) <= x.batch)


def _squeezed(image: Tensor, named: dict[str, Any]) -> Tensor:
    return image.squeeze(tuple(named["dim"]))


def _squeezed_batch(x: Placed, named: dict[str, Any]) -> int:
    assert x.batch is not None
    gone = [dim % rank_of(x) for dim in named["dim"]]
    if x.batch in gone:
        raise Unsupported("removes the batch")
    return x.batch - len([dim for dim in gone if dim < x.batch and x.sizes[dim] == 1])


def within_image(x: Placed, dim: int) -> int:
    """Return a dimension from the front, which must not be the batch."""
    found = dim % rank_of(x)
    if found == x.batch:
        raise Unsupported("takes a part of the batch")
    return found


def _selected_batch(x: Placed, named: dict[str, Any]) -> int:
    assert x.batch is not None
    return x.batch - (within_image(x, named["dim"]) < x.batch)


def _sliced(image: Tensor, named: dict[str, Any]) -> Tensor:
    dim, start, end, step = (named[name] for name in ("dim", "start", "end", "step"))
    whole = image.shape[dim]
    first, last, _ = slice(start, end).indices(whole)
    index = [slice(None)] * image.dim()
    index[dim % image.dim()] = slice(first, last, step)
    return image[tuple(index)]


def _sliced_batch(x: Placed, named: dict[str, Any]) -> int:
    assert x.batch is not None
    start, end = named["start"], named["end"]
    whole = start in (None, 0) and (end is None or (type(end) is int and end >= 1 << 31))
    if named["dim"] % rank_of(x) == x.batch and whole and named["step"] == 1:
        return x.batch
    within_image(x, named["dim"])
    if isinstance(start, fx.Node) or isinstance(end, fx.Node):
        raise Unsupported("takes a part whose size is computed")
    return x.batch


def _unfolded(image: Tensor, named: dict[str, Any]) -> Tensor:
    return image.unfold(named["dimension"], named["size"], named["step"])


def _unfolded_batch(x: Placed, named: dict[str, Any]) -> int:
    assert x.batch is not None
    within_image(x, named["dimension"])
    return x.batch


def _diagonal_batch(x: Placed, named: dict[str, Any]) -> int:
    assert x.batch is not None
    gone = [within_image(x, named[name]) for name in ("dim1", "dim2")]
    return x.batch - sum(dim < x.batch for dim in gone)


def _parts(split: Callable[[Tensor, dict[str, Any]], Sequence[Tensor]], *, drops: bool) -> Handler:
    """Return the handler of an operator that has several views as its result."""

    def handler(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
        x = _moving(run.placed(named["self"]))
        dim = within_image(x, named["dim"])
        assert x.batch is not None
        batch = x.batch - (drops and dim < x.batch)
        settled = run.settled(x)
        run.set(node, tuple(settled.viewed(part, batch) for part in split(settled.image, named)))

    return handler


def _reshape(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, wanted = _moving(run.placed(named["self"])), shape_of(run, node)
    assert x.batch is not None
    given = list(named["shape"])
    batch = batch_after_reshape(x.sizes, x.batch, wanted, BATCH)
    if batch is None or (type(given[batch]) is int and given[batch] != -1):
        raise Unsupported("mixes the numbers of several images")
    shape = (*wanted[:batch], wanted[batch] // BATCH, *wanted[batch + 1 :])
    run.set(node, reshaped(x, shape, batch))


# -- copies ----------------------------------------------------------------------------------------


def taken(
    run: RunMaps, x: Placed, positions: Mapping[int, Sequence[int]], fill: float = 0.0
) -> Placed:
    """Add a step that takes positions of some dimensions, in an order, also several times.

    Args:
        run: the program.
        x: a float value.
        positions: positions for each dimension; -1 for `fill`. All of the others are taken.
        fill: number where there is none.
    """
    x = run.settled(x)
    if isinstance(x.source, Tensor):
        x = replace(x, source=run.natural(x), image=dense_image(x.sizes))
    assert not isinstance(x.source, Tensor)
    order = memory_order(x.image)
    tables = [
        [
            position if position < 0 else position * x.image.stride(dim)
            for position in positions.get(dim, range(x.image.shape[dim]))
        ]
        for dim in order
    ]
    made = run.rearrange(x.source, tables, int(x.image.storage_offset()), fill)
    sizes = [len(positions.get(dim, range(size))) for dim, size in enumerate(x.image.shape)]
    return replace(x, source=made, image=dense_image(sizes, order))


def _whole_images(run: RunMaps, value: Any, dims: Sequence[int]) -> tuple[Placed, list[int]]:
    """Return a value, and dimensions of it from the front, none of them the batch."""
    x = run.flowing(value)
    return x, [within_image(x, dim) for dim in dims]


def _flip(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, dims = _whole_images(run, named["self"], named["dims"])
    run.set(node, taken(run, x, {dim: range(x.sizes[dim])[::-1] for dim in dims}))


def _roll(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    if not named["dims"]:
        raise Unsupported("rolls over all dimensions")
    x, dims = _whole_images(run, named["self"], named["dims"])
    moved = {
        dim: [(at - shift) % x.sizes[dim] for at in range(x.sizes[dim])]
        for dim, shift in zip(dims, named["shifts"], strict=True)
    }
    run.set(node, taken(run, x, moved))


def _index_select(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, (dim,) = _whole_images(run, named["self"], [named["dim"]])
    index = run.tensor(named["index"])
    run.set(node, taken(run, x, {dim: [i % x.sizes[dim] for i in index.flatten().tolist()]}))


def _index(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    """Take constant positions of one dimension, or of several whose indices span a grid."""
    given = [(dim, run.tensor(i)) for dim, i in enumerate(named["indices"]) if i is not None]
    x, dims = _whole_images(run, named["self"], [dim for dim, _ in given])
    if dims != [*range(dims[0], dims[0] + len(dims))] or any(
        index.dtype == torch.bool for _, index in given
    ):
        raise Unsupported("has indices that no step takes")
    rank = max(index.dim() for _, index in given)
    positions: dict[int, list[int]] = {}
    for at, (dim, index) in enumerate(given):
        along = [d for d in range(index.dim()) if index.shape[d] > 1]
        if len(given) > 1 and along not in ([], [at + index.dim() - len(given)]):
            raise Unsupported("has indices that no step takes")
        positions[dim] = [i % x.sizes[dim] for i in index.flatten().tolist()]
    if len(given) > 1 and rank != len(given):
        raise Unsupported("has indices that no step takes")
    found = taken(run, x, positions)
    wanted = shape_of(run, node)
    run.set(node, reshaped(found, (x.sizes[0], *wanted[1:]), 0))


def _pad(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x = run.flowing(named["self"])
    pads = _pairs(named["pad"], rank_of(x))
    if 0 in pads and pads[0] != (0, 0):
        raise Unsupported("pads the batch")
    channels = zero_channels(node)
    if channels is not None and len(x.sizes) == 4 and x.sizes[0] == 1:
        height, width = x.sizes[2:]
        pool: dict[str, Any] = {"pool": (1, 1, 1, 1, 0, 0), "size": (height, width)}
        (made,) = run.emit("average", x=run.pixels(x), **pool, **channels)
        run.set(node, place_map(made))
        return
    positions = {
        dim: [at if 0 <= at < x.sizes[dim] else -1 for at in range(-before, x.sizes[dim] + after)]
        for dim, (before, after) in pads.items()
    }
    run.set(node, taken(run, x, positions, float(named["value"] or 0)))


def zero_channels(node: fx.Node | None) -> dict[str, int] | None:
    """Return the zero channels that a pad adds before and after, None for any other node."""
    pad = None if node is None else zero_pad(node)
    if pad is None or len(pad) != 6 or any(pad[:4]):
        return None
    return {"channels_before": pad[4], "channels_after": pad[5]}


def _pairs(pad: Sequence[int], rank: int) -> dict[int, tuple[int, int]]:
    """Return what a pad adds before and after each dimension that it names."""
    return {
        rank - 1 - at: (pad[2 * at], pad[2 * at + 1])
        for at in range(len(pad) // 2)
        if (pad[2 * at], pad[2 * at + 1]) != (0, 0)
    }


def _edge_pad(position: Callable[[int, int], int]) -> Handler:
    """Return the handler of a pad with numbers of the map, at `position(place, size)`."""

    def handler(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
        x = run.flowing(named["self"])
        positions = {
            dim: [position(at, x.sizes[dim]) for at in range(-before, x.sizes[dim] + after)]
            for dim, (before, after) in _pairs(named["padding"], rank_of(x)).items()
        }
        run.set(node, taken(run, x, positions) if positions else x)

    return handler


def _mirrored(at: int, size: int) -> int:
    at = abs(at)
    return 2 * (size - 1) - at if at >= size else at


def _nearest_inside(at: int, size: int) -> int:
    return min(max(at, 0), size - 1)


# -- shuffles --------------------------------------------------------------------------------------


def _regrouped(
    run: RunMaps,
    node: fx.Node,
    named: dict[str, Any],
    split: Sequence[int],
    order: Sequence[int],
) -> None:
    """Reshape an image to `split`, permute, and reshape to the node's own shape."""
    x = run.flowing(named["self"])
    wanted = shape_of(run, node)
    parts = run.settled(reshaped(x, tuple(split), 0))
    moved = parts.viewed(parts.image.permute(tuple(order)), 0)
    run.set(node, reshaped(moved, (x.sizes[0], *wanted[1:]), 0))


def _pixel_shuffle(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    factor = named["upscale_factor"]
    *front, channels, height, width = run.flowing(named["self"]).sizes
    split = (*front, channels // factor**2, factor, factor, height, width)
    c = len(front)
    order = (*range(c + 1), c + 3, c + 1, c + 4, c + 2)
    _regrouped(run, node, named, split, order)


def _pixel_unshuffle(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    factor = named["downscale_factor"]
    *front, channels, height, width = run.flowing(named["self"]).sizes
    split = (*front, channels, height // factor, factor, width // factor, factor)
    c = len(front)
    _regrouped(run, node, named, split, (*range(c + 1), c + 2, c + 4, c + 1, c + 3))


def _channel_shuffle(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    groups = named["groups"]
    images, channels, *rest = run.flowing(named["self"]).sizes
    split = (images, groups, channels // groups, *rest)
    _regrouped(run, node, named, split, (0, 2, 1, *range(3, len(split))))


# -- resizing --------------------------------------------------------------------------------------


def _nearest(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, wanted = run.flowing(named["input"]), shape_of(run, node)
    factors = named["scale_factors"] or [None] * (len(wanted) - 2)
    positions = {}
    for dim, factor in zip(range(2, len(wanted)), factors, strict=True):
        size, count = x.sizes[dim], wanted[dim]
        step = torch.tensor(size / count if factor is None else 1.0 / factor, dtype=torch.float32)
        places = (torch.arange(count, dtype=torch.float32) * step).floor().long()
        positions[dim] = places.clamp_max(size - 1).tolist()
    run.set(node, taken(run, x, positions))


# -- constants -------------------------------------------------------------------------------------


HANDLERS: dict[str, Handler] = {
    "reshape": _reshape,
    "permute": _view(lambda x, named: x.permute(named["dims"]), _permuted_batch),
    "unsqueeze": _view(lambda x, named: x.unsqueeze(named["dim"]), _unsqueezed_batch),
    "squeeze": _view(_squeezed, _squeezed_batch),
    "select": _view(lambda x, named: x.select(named["dim"], named["index"]), _selected_batch),
    "slice": _view(_sliced, _sliced_batch),
    "unfold": _view(_unfolded, _unfolded_batch),
    "diagonal": _view(
        lambda x, named: x.diagonal(named["offset"], named["dim1"], named["dim2"]), _diagonal_batch
    ),
    **dict.fromkeys(
        ("split", "unsafe_split"),
        _parts(lambda x, named: torch.split(x, named["split_size"], named["dim"]), drops=False),
    ),
    "split_sizes": _parts(
        lambda x, named: torch.split(x, list(named["split_sizes"]), named["dim"]), drops=False
    ),
    "unbind": _parts(lambda x, named: x.unbind(named["dim"]), drops=True),
    "flip": _flip,
    "roll": _roll,
    "index_select": _index_select,
    "index": _index,
    "take_positions": _index,
    "pad": _pad,
    **{f"reflection_pad{d}d": _edge_pad(_mirrored) for d in (1, 2, 3)},
    **{f"replication_pad{d}d": _edge_pad(_nearest_inside) for d in (1, 2, 3)},
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "channel_shuffle": _channel_shuffle,
    **{f"upsample_nearest{d}d": _nearest for d in (1, 2, 3)},
}
"""The native steps of moves, by the names of their declarations."""
