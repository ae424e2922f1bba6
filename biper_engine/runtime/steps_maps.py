"""Native steps of float maps: convolutions, linear layers, pools, resizing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry, pool_positions
from biper_engine.graph.patterns import ConvTail, conv2d_geometry, only_user, pair, tail_of
from biper_engine.graph.reading import arguments
from biper_engine.ops.cpu_program import Map
from biper_engine.runtime.placement import (
    Placed,
    constant_of,
    dense_image,
    fills,
    memory_order,
    place_map,
    place_packed,
    without_gaps,
)
from biper_engine.runtime.runs import RunMaps, Unsupported
from biper_engine.runtime.steps_arithmetic import apply
from biper_engine.runtime.steps_joins import join
from biper_engine.runtime.steps_moves import shape_of, taken, zero_channels

__all__ = ["HANDLERS", "add_linear", "is_pointwise"]

Handler = Callable[[RunMaps, fx.Node, dict[str, Any]], None]

_NO_TAIL = ConvTail((), Pool2dGeometry(), (float("-inf"), float("inf")), ())


def is_pointwise(geometry: Conv2dGeometry) -> bool:
    """Whether each pixel of a convolution's result comes from the same pixel of its input."""
    return (geometry.kernel_size, geometry.stride) == ((1, 1), (1, 1)) and not any(geometry.padding)


def _image(run: RunMaps, value: Any, rank: int = 4) -> Placed:
    """Return a float map [1, C, ...], one for each image of the batch."""
    x = run.flowing(value)
    if len(x.sizes) != rank:
        raise Unsupported(f"takes {value}, which has {len(x.sizes)} dimensions")
    if x.sizes[0] != 1:
        raise Unsupported(f"takes {value}, which has several maps for each image")
    return x


# -- convolutions ----------------------------------------------------------------------------------


def _conv2d(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    weight, bias = run.tensor(named["weight"]), run.optional_tensor(named["bias"])
    geometry = conv2d_geometry(node, weight)
    x = run.flowing(named["input"])
    if not is_pointwise(geometry) or geometry.groups != 1:
        x = _image(run, named["input"])
    if geometry.groups != 1:
        run.set(node, _grouped(run, x, weight, bias, geometry))
        return
    tail = tail_of(node) if x.sizes[0] == 1 else _NO_TAIL
    last = tail.nodes[-1] if tail.nodes else node
    named_bits = arguments(tail.bits[0]) if tail.bits else {}
    want_float = len(last.users) > len(tail.bits) or not tail.bits
    written = run.emit(
        "float_conv",
        *tail.nodes,
        *tail.bits,
        x=run.pixels(x),
        weight=weight.permute(0, 2, 3, 1),
        bias=bias,
        geometry=geometry,
        pool=tail.pool,
        clamp_min=tail.limits[0],
        clamp_max=tail.limits[1],
        want_float=want_float,
        want_bits=bool(tail.bits),
        threshold=run.optional_tensor(named_bits.get("threshold")),
        sense=run.optional_tensor(named_bits.get("sense")),
    )
    run.set(last, place_map(written[0], x.sizes[0]) if want_float else None)
    for bits in tail.bits:
        run.set(bits, place_packed(written[-1]))


def _float_conv(
    run: RunMaps, x: Placed, weight: Tensor, bias: Tensor | None, geometry: Conv2dGeometry
) -> Placed:
    """Add a convolution without groups and without what follows it."""
    (made,) = run.emit(
        "float_conv",
        x=run.pixels(x),
        weight=weight.permute(0, 2, 3, 1),
        bias=bias,
        geometry=geometry,
        pool=Pool2dGeometry(),
        want_float=True,
        want_bits=False,
    )
    return place_map(made, x.sizes[0])


def _grouped(
    run: RunMaps, x: Placed, weight: Tensor, bias: Tensor | None, geometry: Conv2dGeometry
) -> Placed:
    groups, outputs = geometry.groups, geometry.out_channels
    if groups == 1:
        return _float_conv(run, x, weight, bias, geometry)
    if groups == geometry.in_channels == outputs:
        (made,) = run.emit(
            "depthwise_conv",
            x=run.pixels(x),
            weight=weight[:, 0].permute(1, 2, 0),
            bias=bias,
            geometry=geometry,
        )
        return place_map(made)
    alone = replace(
        geometry,
        groups=1,
        in_channels=geometry.in_channels // groups,
        out_channels=outputs // groups,
    )
    x = run.settled(x)
    parts = x.image.chunk(groups, 1)
    weights = weight.chunk(groups)
    biases = [None] * groups if bias is None else bias.chunk(groups)
    made_parts = [
        _float_conv(run, x.viewed(part, 0), w, b, alone)
        for part, w, b in zip(parts, weights, biases, strict=True)
    ]
    return join(run, made_parts, 1)


def _convolution(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    """Convolve in one dimension, as a map of height 1, or in two; also transposed."""
    weight, bias = run.tensor(named["weight"]), run.optional_tensor(named["bias"])
    count = weight.dim() - 2
    if count not in (1, 2):
        raise Unsupported(f"convolves in {count} dimensions")
    x = run.settled(_image(run, named["input"], count + 2))
    one = count == 1
    if one:
        x, weight = x.viewed(x.image.unsqueeze(2), 0), weight.unsqueeze(2)
    stride, padding, dilation, extra = (
        (other, along[-1]) if one else pair(along)
        for along, other in (
            (named["stride"], 1),
            (named["padding"], 0),
            (named["dilation"], 1),
            (named["output_padding"], 0),
        )
    )
    groups = named["groups"]
    if named["transposed"]:
        kernel = (weight.shape[2], weight.shape[3])
        x = _spread_out(run, x, stride, padding, dilation, extra, kernel)
        weight, stride, padding = _turned(weight, groups), (1, 1), (0, 0)
    made = _grouped(run, x, weight, bias, _geometry(weight, stride, padding, dilation, groups))
    run.set(node, made.viewed(made.image.squeeze(2), 0) if one else made)


def _geometry(
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Conv2dGeometry:
    (top, left), (outputs, inputs, height, width) = padding, weight.shape
    return Conv2dGeometry(
        in_channels=inputs * groups,
        out_channels=outputs,
        kernel_size=(height, width),
        stride=stride,
        padding=(top, top, left, left),
        dilation=dilation,
        groups=groups,
    )


def _turned(weight: Tensor, groups: int) -> Tensor:
    """Return the weights [O, I / groups, KH, KW] that convolve as [I, O / groups, KH, KW] do."""
    inputs, outputs, *kernel = weight.shape
    split = weight.view(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
    return split.reshape(groups * outputs, inputs // groups, *kernel).flip(2, 3)


def _spread_out(
    run: RunMaps,
    x: Placed,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    extra: tuple[int, int],
    kernel: tuple[int, int],
) -> Placed:
    """Return a map with zeros between its pixels and around, or without those at its edges."""
    positions = {}
    for axis in range(2):
        reach = dilation[axis] * (kernel[axis] - 1)
        size, step = x.sizes[2 + axis], stride[axis]
        before, after = reach - padding[axis], reach - padding[axis] + extra[axis]
        positions[2 + axis] = [
            at // step if at % step == 0 and 0 <= at < size * step else -1
            for at in range(-before, (size - 1) * step + 1 + after)
        ]
    return taken(run, x, positions)


# -- linear layers ---------------------------------------------------------------------------------


def add_linear(run: RunMaps, x: Placed, weight: Tensor, bias: Tensor | None) -> Placed:
    """Add a product of each row of `x` [..., C] with a weight [O, C]."""
    weight, x, rows = _columns_in_memory(run, x, weight)
    inputs, outputs = math.prod(weight.shape[1:]), weight.shape[0]
    (made,) = run.emit(
        "float_conv",
        x=run.seen(rows, inputs, rows.values // inputs, 1),
        weight=weight,
        bias=bias,
        geometry=Conv2dGeometry(in_channels=inputs, out_channels=outputs, kernel_size=(1, 1)),
        pool=Pool2dGeometry(),
        want_float=True,
        want_bits=False,
    )
    last = x.image.dim() - 1
    order = (*(dim for dim in memory_order(x.image) if dim != last), last)
    return Placed(made, dense_image((*x.image.shape[:-1], outputs), order), x.batch)


def _columns_in_memory(run: RunMaps, x: Placed, weight: Tensor) -> tuple[Tensor, Placed, Map]:
    """Return a weight, a value [..., C] and the map of it, the columns in the order of its memory.

    A flattened map is not copied: the weight's columns are.
    """
    source = x.source
    if x.shape is not None and x.shape[:-1] == (x.image.shape[0],) == (1,):
        inner = replace(x, shape=None, batch=0)
        if isinstance(source, Map) and fills(inner) and without_gaps(x.image):
            order = [dim for dim in memory_order(x.image) if dim != 0]
            columns = weight.view(-1, *x.image.shape[1:])
            return columns.permute(0, *order), replace(inner, image=dense_image(x.shape)), source
    x = run.settled(x)
    last = x.image.dim() - 1
    order = [*(dim for dim in memory_order(x.image) if dim != last), last]
    return weight, x, run.in_order(x, order)


def _linear(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x = run.flowing(named["input"])
    if len(x.sizes) < 2:
        raise Unsupported("is applied to numbers")
    weight, bias = run.tensor(named["weight"]), run.optional_tensor(named["bias"])
    run.set(node, add_linear(run, x, weight, bias))


# -- pools -----------------------------------------------------------------------------------------


def _windows(x: Placed, named: dict[str, Any]) -> dict[str, Any]:
    """Return the window of a pool, and its output size."""
    kernel, padding = pair(named["kernel_size"]), pair(named["padding"])
    stride = pair(named["stride"]) if named["stride"] else kernel
    rows, columns = (
        pool_positions(length, kernel[axis], stride[axis], padding[axis], named["ceil_mode"])
        for axis, length in enumerate(x.sizes[2:])
    )
    return {"pool": (*kernel, *stride, *padding), "size": (rows, columns)}


def _max_pool2d(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x = _image(run, named["self"])
    if pair(named["dilation"]) != (1, 1):
        raise Unsupported("has dilation")
    (made,) = run.emit("maximum", x=run.pixels(x), **_windows(x, named))
    run.set(node, place_map(made))


def _without_positions(handler: Handler) -> Handler:
    """Return the handler of a pool that also says where its results are, which nobody may use."""

    def pool(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
        if any(user.args[1] != 0 for user in node.users):
            raise Unsupported("says where its results are")
        handler(run, node, named)
        run.set(node, (run.placed(node), None))

    return pool


def _average(run: RunMaps, node: fx.Node, x: Placed, **options: Any) -> None:
    """Add a pool and the zero channels behind it."""
    pad = only_user(node)
    channels = zero_channels(pad)
    behind = () if pad is None or channels is None else (pad,)
    (made,) = run.emit("average", *behind, x=run.pixels(x), **options, **(channels or {}))
    run.set((node, *behind)[-1], place_map(made))


def _avg_pool2d(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x = _image(run, named["self"])
    if (named["divisor_override"] or 1) < 0:
        raise Unsupported("has a negative divisor")
    options = {
        "count_padding": named["count_include_pad"],
        "divisor": named["divisor_override"] or 0,
    }
    _average(run, node, x, **_windows(x, named), **options)


def _adaptive_window(x: Placed, size: Sequence[int]) -> dict[str, Any]:
    """Return the window that all places of an adaptive pool share, if they share one."""
    (height, width), (rows, columns) = x.sizes[2:], size
    if min(rows, columns) < 1:
        raise Unsupported("has no windows")
    if height % rows or width % columns:
        return {}
    kernel = (height // rows, width // columns)
    return {"pool": (*kernel, *kernel, 0, 0)}


def _adaptive(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, size = _image(run, named["self"]), tuple(named["output_size"])
    _average(run, node, x, **_adaptive_window(x, size), size=size)


def _adaptive_max(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, size = _image(run, named["self"]), tuple(named["output_size"])
    (made,) = run.emit("maximum", x=run.pixels(x), **_adaptive_window(x, size), size=size)
    run.set(node, place_map(made))


# -- resizing --------------------------------------------------------------------------------------


def _resized(run: RunMaps, x: Placed, dim: int, places: Tensor, weights: Tensor) -> Placed:
    """Add a weighted sum of numbers along a dimension: [taps, size] places and weights."""
    ones = (1,) * (len(x.sizes) - dim - 1)
    made: Placed | None = None
    for at, weight in zip(places, weights, strict=True):
        found = taken(run, x, {dim: at.tolist()})
        factor = constant_of(weight.view(-1, *ones))
        made = (
            apply(run, "multiply", found, factor)
            if made is None
            else apply(run, "add_product", made, found, factor)
        )
    assert made is not None
    return made


def _source_places(size: int, count: int, factor: float | None, corners: bool) -> Tensor:
    """Return where the numbers of a resized dimension come from, in places of the old one."""
    at = torch.arange(count, dtype=torch.float32)
    if corners:
        return at * ((size - 1) / (count - 1) if count > 1 else 0.0)
    step = torch.tensor(size / count if factor is None else 1.0 / factor, dtype=torch.float32)
    return (at + 0.5) * step - 0.5


def _linear_taps(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    x = x.clamp_min(0.0)
    first = x.floor().long().clamp_max(size - 1)
    part = (x - first).clamp(0.0, 1.0)
    return torch.stack([first, (first + 1).clamp_max(size - 1)]), torch.stack([1.0 - part, part])


def _cubic_taps(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Keys' convolution with a = -0.75, as PyTorch's."""
    a = -0.75
    first = x.floor()
    part = x - first

    def near(d: Tensor) -> Tensor:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Tensor) -> Tensor:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    weights = torch.stack([far(part + 1), near(part), near(1 - part), far(2 - part)])
    places = torch.stack([(first.long() + at).clamp(0, size - 1) for at in range(-1, 3)])
    return places, weights


def _interpolation(taps: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Handler:
    def handler(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
        x, wanted = run.flowing(named["input"]), shape_of(run, node)
        factors = named["scale_factors"] or [None] * (len(wanted) - 2)
        for dim, factor in zip(range(2, len(wanted)), factors, strict=True):
            size = x.sizes[dim]
            if (size, factor) == (wanted[dim], None):
                continue
            places = _source_places(size, wanted[dim], factor, named["align_corners"])
            x = _resized(run, x, dim, *taps(places, size))
        run.set(node, x)

    return handler


HANDLERS: dict[str, Handler] = {
    "conv2d": _conv2d,
    "convolution": _convolution,
    "linear": _linear,
    "max_pool2d": _max_pool2d,
    "max_pool2d_positions": _without_positions(_max_pool2d),
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive,
    "adaptive_max_pool2d_positions": _without_positions(_adaptive_max),
    "upsample_linear1d": _interpolation(_linear_taps),
    "upsample_bilinear2d": _interpolation(_linear_taps),
    "upsample_trilinear3d": _interpolation(_linear_taps),
    "upsample_bicubic2d": _interpolation(_cubic_taps),
}
"""The native steps of float maps, by the names of their declarations."""
