"""Patterns: what the operators of a graph mean, and which operators follow them.

Passes of the conversion, fused ends and native steps ask the same questions, answered only here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.graph.reading import arguments, biper_op, is_call

__all__ = [
    "ConvTail",
    "clamp_limits",
    "conv2d_geometry",
    "drops_pixels",
    "is_binarize",
    "is_mean_of_pixels",
    "max_pool_geometry",
    "only_user",
    "pair",
    "per_channel",
    "tail_of",
    "zero_pad",
]

_aten = torch.ops.aten


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the only node that uses a value, or None if there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def pair(value: Any) -> tuple[int, int]:
    """Return (vertical, horizontal) of an argument that may be one number or a list of one."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values[0], values[-1]


def conv2d_geometry(node: fx.Node, weight: Tensor) -> Conv2dGeometry:
    """Return the geometry of a `conv2d` call.

    Args:
        node: the call.
        weight: [O, C / groups, KH, KW], of any dtype.

    Raises:
        GeometryError: the values are not a valid geometry.
    """
    named = arguments(node)
    vertical, horizontal = pair(named["padding"])
    out_channels, group_channels, height, width = weight.shape
    return Conv2dGeometry(
        in_channels=group_channels * named["groups"],
        out_channels=out_channels,
        kernel_size=(height, width),
        stride=pair(named["stride"]),
        padding=(vertical, vertical, horizontal, horizontal),
        dilation=pair(named["dilation"]),
        groups=named["groups"],
    )


def max_pool_geometry(node: fx.Node) -> Pool2dGeometry | None:
    """Return a max pool's geometry; None for another node, or with dilation or ceil_mode."""
    if not is_call(node, _aten.max_pool2d.default):
        return None
    named = arguments(node)
    if named["ceil_mode"] or pair(named["dilation"]) != (1, 1):
        return None
    kernel = pair(named["kernel_size"])
    stride = pair(named["stride"]) if named["stride"] else kernel
    return Pool2dGeometry(kernel_size=kernel, stride=stride, padding=pair(named["padding"]))


def clamp_limits(node: fx.Node) -> tuple[float, float] | None:
    """Return a clamp's lower and upper limit, infinite if there is none; None for another node."""
    if is_call(node, _aten.relu.default):
        return 0.0, math.inf
    if is_call(node, _aten.hardtanh.default):
        names = ("min_val", "max_val")
    elif is_call(node, _aten.clamp.default):
        names = ("min", "max")
    else:
        return None
    low, high = (arguments(node)[name] for name in names)
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def zero_pad(node: fx.Node) -> list[int] | None:
    """Return the zeros that a pad adds; None for another node, other values or cropping.

    The order is [left, right, top, bottom, ...], two for each dimension, the last dimension first.
    """
    if not is_call(node, _aten.constant_pad_nd.default):
        return None
    named = arguments(node)
    pad = list(named["pad"])
    return None if named["value"] not in (0, None) or min(pad, default=0) < 0 else pad


def is_mean_of_pixels(node: fx.Node) -> bool:
    """Whether a node is the mean of a map [N, C, H, W] over H and W, in the map's dtype."""
    if not is_call(node, _aten.mean.dim):
        return False
    named = arguments(node)
    return sorted(d % 4 for d in named["dim"] or ()) == [2, 3] and named["dtype"] is None


def drops_pixels(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Whether a node reshapes a value from [N, C, 1, 1] to [N, C]."""
    return len(after) == 2 and tuple(before[1:]) == (after[1], 1, 1)


def per_channel(value: Any, channels: int, rank: int) -> Tensor | None:
    """Return an operand as one number for each channel of a map, float64 [C] on the CPU.

    Args:
        value: a number, or a constant tensor.
        channels: number of channels of the map, C.
        rank: number of dimensions of the map, [N, C, ...].

    Returns:
        None if it varies along a dimension other than the channels, or is anything else.
    """
    if isinstance(value, int | float):
        return torch.full((channels,), float(value), dtype=torch.float64)
    if not isinstance(value, Tensor) or value.is_complex():
        return None
    sizes = [1] * (rank - value.dim()) + list(value.shape)  # aligned at the right
    if len(sizes) != rank or sizes[1] not in (1, channels) or math.prod(sizes) != sizes[1]:
        return None
    return value.double().cpu().flatten().expand(channels)


def is_binarize(node: fx.Node) -> bool:
    """Whether a node is a `binarize` with constant parameters."""
    if biper_op(node) != "binarize":
        return False
    named = arguments(node)
    parameters = (named["threshold"], named["sense"])
    return all(value is None or value.op == "get_attr" for value in parameters)


@dataclass(frozen=True)
class ConvTail:
    """The nodes after a float convolution that can be computed together with it.

    Attributes:
        nodes: a max pool and a clamp, at most one of each, in their order.
        pool: the pool's geometry; the identity if there is no pool.
        limits: limits of the clamp; infinite if there is no clamp.
        bits: the first `binarize` of the value, and all that are equal to it.
    """

    nodes: tuple[fx.Node, ...]
    pool: Pool2dGeometry
    limits: tuple[float, float]
    bits: tuple[fx.Node, ...]


def tail_of(conv: fx.Node) -> ConvTail:
    """Return the nodes after a float convolution that can be computed together with it.

    A pool and a clamp commute: a clamp is monotone, and padding is never a maximum.
    """
    nodes: list[fx.Node] = []
    pool, limits = None, None
    last = conv
    while (user := only_user(last)) is not None:
        window, clamp = max_pool_geometry(user), clamp_limits(user)
        if window is not None and pool is None:
            pool = window
        elif clamp is not None and limits is None:
            limits = clamp
        else:
            break
        nodes.append(user)
        last = user
    bits = [user for user in last.users if is_binarize(user)]
    same = (user for user in bits if arguments(user) == arguments(bits[0]))
    return ConvTail(
        tuple(nodes), pool or Pool2dGeometry(), limits or (-math.inf, math.inf), tuple(same)
    )
