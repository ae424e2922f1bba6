"""Native steps: which operators a program of `csrc/cpu` can run, and how they are added to one.

A step stands for one operator or for several: a float convolution takes the max pool, the clamp and
the bits behind it along, an average pool the zero channels, a sum its clamp.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry, pool_positions
from biper_engine.graph.choice import prepack_node
from biper_engine.graph.operators import operator_of
from biper_engine.graph.patterns import (
    clamp_limits,
    conv2d_geometry,
    is_mean_of_pixels,
    only_user,
    pair,
    tail_of,
    zero_pad,
)
from biper_engine.graph.reading import arguments, biper_op
from biper_engine.ops.checks import check_epilogue
from biper_engine.ops.cpu_program import Map
from biper_engine.ops.registration import split_options
from biper_engine.runtime.runs import RunMaps, Unsupported

__all__ = ["RunBuilder"]

aten = torch.ops.aten


class RunBuilder(RunMaps):
    """Adds operators to a program, step by step."""

    def add(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Add a node, and those behind it that its step takes along.

        Returns:
            All nodes that were added.

        Raises:
            Unsupported: the node has no step; nothing was added.
        """
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            self._maps[node] = self._maps[source][index]
            self.nodes.append(node)
            return (node,)
        declared = operator_of(node)
        handler = None if declared is None else _HANDLERS.get(declared.name)
        if handler is None:
            raise Unsupported("has no native step")
        inputs, steps = len(self.inputs), len(self.steps)
        try:
            handler(self, node, arguments(node))
        except Unsupported:
            while len(self.inputs) > inputs:
                unused, _ = self.inputs.popitem()
                self._flat.pop(unused, None)
            raise
        added = self.steps[-1].nodes if len(self.steps) > steps else (node,)
        self.nodes.extend(added)
        return added

    # -- binary operators -------------------------------------------------------------------------

    def _bconv(self, node: fx.Node, named: dict[str, Any]) -> None:
        held: dict[str, Any] = {
            name: self._constant(value) if isinstance(value, fx.Node) else value
            for name, value in named.items()
            if name not in ("bits", "residual", "prepacked")
        }
        op = str(biper_op(node))
        weight = held["weight"]
        given = {name: value for name, value in held.items() if value is not None}
        geometry, epilogue, _, _ = split_options(weight, held["multiplier"], held["bias"], given)
        want_bits, want_float = op != "bconv2d_float", op != "bconv2d_bits"
        check_epilogue(epilogue, geometry.out_channels, torch.device("cpu"), wants_bits=want_bits)
        if want_float and named["dtype"] != torch.float32:
            raise Unsupported(f"writes {named['dtype']}")
        source = self._map(named["bits"], geometry.in_channels)
        written = self._program.add(
            "conv",
            bits=source,
            residual=None if named.get("residual") is None else self._image(named["residual"]),
            geometry=geometry,
            prepacked=prepack_node(node, weight),
            want_float=want_float,
            want_bits=want_bits,
            **epilogue.values(),
        )
        self._maps[node] = written if want_float and want_bits else written[0]
        self._step(node, macs=geometry.macs(source.height, source.width))

    def _binarize(self, node: fx.Node, named: dict[str, Any]) -> None:
        limits = {name: self._constant(named.get(name)) for name in ("threshold", "sense")}
        self._write(node, "binarize", x=self._image(named["x"]), **limits)

    def _bit_pool(self, node: fx.Node, named: dict[str, Any]) -> None:
        pool = Pool2dGeometry(
            kernel_size=tuple(named["kernel_size"]),
            stride=tuple(named["stride"]),
            padding=tuple(named["padding"] or (0, 0)),
        )
        take_and = self._constant(named.get("take_and"))
        bits = self._map(named["bits"], named["channels"])
        self._write(node, "bit_pool", bits=bits, pool=pool, take_and=take_and)

    def _write(self, node: fx.Node, step: str, *behind: fx.Node, **arguments: Any) -> None:
        """Add a step for a node, and for those `behind` it, whose last value its one map is."""
        (self._maps[(node, *behind)[-1]],) = self._program.add(step, **arguments)
        self._step(node, *behind)

    # -- float operators --------------------------------------------------------------------------

    def _conv2d(self, node: fx.Node, named: dict[str, Any]) -> None:
        x, weight = self._image(named["input"]), self._constant(named["weight"])
        assert weight is not None
        if named["groups"] != 1:
            raise Unsupported("has groups")
        geometry, tail = conv2d_geometry(node, weight), tail_of(node)
        last = tail.nodes[-1] if tail.nodes else node
        named_bits = arguments(tail.bits[0]) if tail.bits else {}
        want_float = len(last.users) > len(tail.bits) or not tail.bits
        written = self._program.add(
            "float_conv",
            x=x,
            weight=weight.permute(0, 2, 3, 1),
            bias=self._constant(named["bias"]),
            geometry=geometry,
            pool=tail.pool,
            **_clamp_of(tail.limits),
            want_float=want_float,
            want_bits=bool(tail.bits),
            threshold=self._constant(named_bits.get("threshold")),
            sense=self._constant(named_bits.get("sense")),
        )
        self._maps[last] = written[0] if want_float else None
        self._maps |= dict.fromkeys(tail.bits, written[-1])
        self._step(node, *tail.nodes, *tail.bits)

    def _linear(self, node: fx.Node, named: dict[str, Any]) -> None:
        source = named["input"]
        x, weight = self._map(source), self._constant(named["weight"])
        assert weight is not None
        if source not in self._flat:
            raise Unsupported("is applied to a map")
        flattened = self._flat[source]
        if flattened is not None:  # columns in the order of the map's memory
            weight = weight.view(-1, *flattened).permute(0, 2, 3, 1).flatten(1)
        geometry = Conv2dGeometry(
            in_channels=x.channels, out_channels=len(weight), kernel_size=(1, 1)
        )
        self._flat[node] = None
        self._write(
            node,
            "float_conv",
            x=x,
            weight=weight,
            bias=self._constant(named["bias"]),
            geometry=geometry,
            pool=Pool2dGeometry(),
            want_float=True,
            want_bits=False,
        )

    def _reshape(self, node: fx.Node, named: dict[str, Any]) -> None:
        source, sizes = named["self"], list(named["shape"])
        if source not in self._maps and source.op != "placeholder":
            raise Unsupported("shows the memory of what is made outside")
        x = self._map(source)
        values = x.channels * x.height * x.width
        moved = x.height * x.width > 1
        flattens = sizes == [-1, values]
        if self._flat.get(source) is not None or not (
            flattens or (sizes == [-1, values, 1, 1] and not moved)
        ):
            raise Unsupported("rearranges a map")
        if flattens:
            self._flat[node] = (x.channels, x.height, x.width) if moved else None
        view = self._maps[node] = self._program.view(x, values, 1, 1)
        self._roots[view.index] = self._roots.get(x.index, x.index)

    def _max_pool2d(self, node: fx.Node, named: dict[str, Any]) -> None:
        x = self._image(named["self"])
        if pair(named["dilation"]) != (1, 1):
            raise Unsupported("has dilation")
        self._write(node, "maximum", x=x, **_windows(x, named))

    def _average(self, node: fx.Node, x: Map, **options: Any) -> None:
        """Add a pool and the zero channels behind it."""
        pad = only_user(node)
        channels = _padded_channels(pad) if pad is not None else None
        if pad is None or channels is None:
            self._write(node, "average", x=x, **options)
        else:
            self._write(node, "average", pad, x=x, **options, **channels)

    def _avg_pool2d(self, node: fx.Node, named: dict[str, Any]) -> None:
        x = self._image(named["self"])
        self._average(
            node,
            x,
            **_windows(x, named),
            count_padding=named["count_include_pad"],
            divisor=named["divisor_override"] or 0,
        )

    def _mean(self, node: fx.Node, named: dict[str, Any]) -> None:
        x = self._image(named["self"])
        if not is_mean_of_pixels(node):
            raise Unsupported("is no mean over height and width")
        if not named["keepdim"]:
            self._flat[node] = None
        whole = (x.height, x.width)
        self._write(node, "average", x=x, pool=(*whole, *whole, 0, 0), size=(1, 1))

    def _adaptive(self, node: fx.Node, named: dict[str, Any]) -> None:
        x, (rows, columns) = self._image(named["self"]), named["output_size"]
        if min(rows, columns) < 1 or x.height % rows or x.width % columns:
            raise Unsupported("has windows of several sizes")
        kernel = (x.height // rows, x.width // columns)
        self._average(node, x, pool=(*kernel, *kernel, 0, 0), size=(rows, columns))

    def _pad(self, node: fx.Node, named: dict[str, Any]) -> None:
        channels = _padded_channels(node)
        if channels is None:
            raise Unsupported("pads other than channels with zeros")
        x = self._image(named["self"])
        size = (x.height, x.width)
        self._write(node, "average", x=x, pool=(1, 1, 1, 1, 0, 0), size=size, **channels)

    def _clamp(self, node: fx.Node, named: dict[str, Any]) -> None:
        limits = clamp_limits(node)
        assert limits is not None
        self._write(node, "sum", a=self._image(named["self"]), **_clamp_of(limits))

    def _sigmoid(self, node: fx.Node, named: dict[str, Any]) -> None:
        source = named["self"]
        x = self._map(source)
        if self._flat.get(source) is not None:
            raise Unsupported("is applied to a flattened map")
        if source in self._flat:
            self._flat[node] = None
        self._write(node, "sigmoid", x=x)

    def _add(self, node: fx.Node, named: dict[str, Any]) -> None:
        a, b = self._image(named["self"]), self._image(named["other"])
        if named["alpha"] != 1 or (a.channels, a.height, a.width) != (
            b.channels,
            b.height,
            b.width,
        ):
            raise Unsupported("is no sum of two maps of one shape")
        behind = only_user(node)
        limits = None if behind is None else clamp_limits(behind)
        if behind is None or limits is None:
            self._write(node, "sum", a=a, b=b)
        else:
            self._write(node, "sum", behind, a=a, b=b, **_clamp_of(limits))


def _windows(x: Map, named: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the window of a pool, and its output size."""
    kernel, padding = pair(named["kernel_size"]), pair(named["padding"])
    stride = pair(named["stride"]) if named["stride"] else kernel
    rows, columns = (
        pool_positions(length, kernel[axis], stride[axis], padding[axis], named["ceil_mode"])
        for axis, length in enumerate((x.height, x.width))
    )
    return {"pool": (*kernel, *stride, *padding), "size": (rows, columns)}


def _clamp_of(limits: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("clamp_min", "clamp_max"), limits, strict=True))


def _padded_channels(node: fx.Node) -> dict[str, int] | None:
    """Return the zero channels that a pad adds before and after, None for any other node."""
    pad = zero_pad(node)
    if pad is None or len(pad) != 6 or any(pad[:4]):
        return None
    return {"channels_before": pad[4], "channels_after": pad[5]}


_HANDLERS: dict[str, Callable[[RunBuilder, fx.Node, dict[str, Any]], None]] = {
    "biper.bconv2d_float": RunBuilder._bconv,
    "biper.bconv2d_bits": RunBuilder._bconv,
    "biper.bconv2d_float_bits": RunBuilder._bconv,
    "biper.binarize": RunBuilder._binarize,
    "biper.bmaxpool2d": RunBuilder._bit_pool,
    "conv2d": RunBuilder._conv2d,
    "linear": RunBuilder._linear,
    "reshape": RunBuilder._reshape,
    "max_pool2d": RunBuilder._max_pool2d,
    "avg_pool2d": RunBuilder._avg_pool2d,
    "mean": RunBuilder._mean,
    "adaptive_avg_pool2d": RunBuilder._adaptive,
    "pad": RunBuilder._pad,
    "hardtanh": RunBuilder._clamp,
    "clamp": RunBuilder._clamp,
    "relu": RunBuilder._clamp,
    "add": RunBuilder._add,
    "sigmoid": RunBuilder._sigmoid,
}
"""The native step of each operator that has one, by the name of its declaration."""
