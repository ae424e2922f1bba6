"""Native steps of the operators on bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from biper_engine.bits import WORD_BITS
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.graph.reading import biper_op
from biper_engine.ops.checks import check_epilogue
from biper_engine.ops.cpu_program import Map
from biper_engine.ops.registration import split_options
from biper_engine.runtime.placement import Placed, place_map, place_packed
from biper_engine.runtime.runs import RunMaps, Unsupported
from biper_engine.runtime.steps_maps import is_pointwise

__all__ = ["HANDLERS"]

Handler = Callable[[RunMaps, fx.Node, dict[str, Any]], None]


def _bconv(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    held: dict[str, Any] = {
        name: run.tensor(value) if isinstance(value, fx.Node) else value
        for name, value in named.items()
        if name not in ("bits", "residual", "gate", "prepacked")
    }
    op = str(biper_op(node))
    weight = held["weight"]
    given = {name: value for name, value in held.items() if value is not None}
    geometry, epilogue, _, _ = split_options(weight, held["multiplier"], held["bias"], given)
    want_bits, want_float = op != "bconv2d_float", op != "bconv2d_bits"
    check_epilogue(epilogue, geometry.out_channels, torch.device("cpu"), wants_bits=want_bits)
    if want_float and named["dtype"] != torch.float32:
        raise Unsupported(f"writes {named['dtype']}")
    source = run.bits(named["bits"], geometry.in_channels)
    images = run.placed(named["bits"]).sizes[0]
    if images > 1 and not (is_pointwise(geometry) and epilogue.pool.is_identity):
        raise Unsupported(f"takes {named['bits']}, which has several maps for each image")
    residual = None if named.get("residual") is None else run.flowing(named["residual"])
    written = run.emit(
        "conv",
        bits=source,
        residual=None if residual is None else _residual(run, residual, geometry),
        gate=None if named.get("gate") is None else _gate(run, named["gate"], images),
        geometry=geometry,
        weight=weight,
        want_float=want_float,
        want_bits=want_bits,
        macs=geometry.macs(source.height, source.width),
        **epilogue.values(),
    )
    floats = place_map(written[0], images) if want_float else None
    bits = place_packed(written[-1], images) if want_bits else None
    run.set(node, (floats, bits) if want_float and want_bits else floats or bits)


def _gate(run: RunMaps, node: fx.Node, images: int) -> Map:
    """Return a gate as a map with a pixel for each image of the result."""
    gate = run.flowing(node)
    if gate.sizes[0] != images:
        raise Unsupported(f"takes {node}, which has not one row for each image")
    return run.seen(run.natural(gate), gate.sizes[1], images, 1)


def _residual(run: RunMaps, x: Placed, geometry: Conv2dGeometry) -> Map:
    """Return the map that is added: of fewer channels, if it is added to several runs of them."""
    # csrc/cpu/step_conv.cpp: vectors of output channels must not see the end of the map.
    if x.shape is not None and x.image.dim() == 5 and x.image.stride(1) == 0:
        once = x.viewed(x.image[:, 0], x.batch)
        if once.sizes[1] % WORD_BITS == 0 and geometry.groups == 1:
            return run.pixels(once)
    return run.pixels(x)


def _binarize(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x = run.flowing(named["x"])
    limits: dict[str, Any] = {
        name: run.optional_tensor(named.get(name)) for name in ("threshold", "sense")
    }
    if len(x.sizes) != 4:
        raise Unsupported(f"takes {named['x']}, which is no map")
    (bits,) = run.emit("binarize", x=run.pixels(x), **limits)
    run.set(node, place_packed(bits, x.sizes[0]))


def _unbinarize(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    bits = run.bits(named["bits"], named["channels"])
    images = run.placed(named["bits"]).sizes[0]
    (made,) = run.emit("unbinarize", bits=bits)
    run.set(node, place_map(made, images))


def _bit_pool(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    pool = Pool2dGeometry(
        kernel_size=tuple(named["kernel_size"]),
        stride=tuple(named["stride"]),
        padding=tuple(named["padding"] or (0, 0)),
    )
    take_and = run.optional_tensor(named.get("take_and"))
    bits = run.bits(named["bits"], named["channels"])
    if run.placed(named["bits"]).sizes[0] != 1:
        raise Unsupported(f"takes {named['bits']}, which has several maps for each image")
    (made,) = run.emit("bit_pool", bits=bits, pool=pool, take_and=take_and)
    run.set(node, place_packed(made))


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(
        ("biper.bconv2d_float", "biper.bconv2d_bits", "biper.bconv2d_float_bits"), _bconv
    ),
    "biper.binarize": _binarize,
    "biper.unbinarize": _unbinarize,
    "biper.bmaxpool2d": _bit_pool,
}
"""The native steps of operators on bits, by the names of their declarations."""
