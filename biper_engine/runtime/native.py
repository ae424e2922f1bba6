"""The native plan: a whole network as one call into `csrc/cpu`.

Every node of the graph becomes a step, or part of one: a float convolution takes the max pool, the
clamp and the bits behind it along, an average pool the zero channels, a sum its clamp. A network
with an operator that has no step runs operator by operator instead.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry, pool_positions
from biper_engine.ops.backends import select
from biper_engine.ops.checks import check_epilogue
from biper_engine.ops.cpu_program import Clamp, CpuProgram, Map
from biper_engine.ops.registration import split_options
from biper_engine.runtime.binding import prepack_node
from biper_engine.runtime.choice import node_backend
from biper_engine.runtime.graph import (
    biper_op,
    get_constant,
    named_arguments,
    output_values,
    with_defaults,
)

__all__ = ["NativePlan", "NativeStep", "native_plan"]

aten = torch.ops.aten

_CLAMPS = (aten.hardtanh.default, aten.clamp.default, aten.relu.default)


class _Unsupported(Exception):
    """A node without a step; the message says which and why."""


@dataclass(frozen=True)
class NativeStep:
    """One step of a program.

    Attributes:
        nodes: of the graph, which it stands for.
        macs: multiply-accumulates on bits of one image, padded taps counted; None without any.
    """

    nodes: tuple[fx.Node, ...]
    macs: int | None = None


@dataclass(frozen=True)
class NativePlan:
    """A network as a native program.

    Attributes:
        program: takes and returns what the graph does.
        steps: in the order in which they run.
    """

    program: CpuProgram
    steps: tuple[NativeStep, ...]


def native_plan(
    module: fx.GraphModule,
    device: torch.device | None,
    images: Sequence[tuple[int, ...]] | None,
) -> NativePlan | str:
    """Build the program of a network.

    Args:
        module: a converted network.
        device: where its tensors are.
        images: shape of one image of each input, [C, H, W]; None where an input is no float32 map.

    Returns:
        The plan, or why there is none.

    Raises:
        BackendUnavailableError: a backend is forced that cannot run the network.
    """
    if device is None or device.type != "cpu":
        return f"the network is on {device}"
    if images is None:
        return "an input is no batch of float32 images"
    others = {node_backend(module, node, device) for node in module.graph.nodes} - {None, "cpu"}
    if others:
        return f"operators run on backend {', '.join(sorted(map(str, others)))}"
    if select("binarize", None, device).name != "cpu":
        return "the cpu backend does not run here"
    # Plans outlive the mode of the call that makes them; an inference tensor would not.
    with torch.inference_mode(False), torch.no_grad():
        try:
            return _Builder(module, images).build()
        except _Unsupported as reason:
            return str(reason)


class _Builder:
    def __init__(self, module: fx.GraphModule, images: Sequence[tuple[int, ...]]) -> None:
        self._module = module
        self._images = images
        self._program = CpuProgram()
        self._maps: dict[fx.Node, Any] = {}  # Map, or a pair of them
        self._flat: dict[fx.Node, tuple[int, int, int] | None] = {}  # [N, features] values
        self._steps: list[NativeStep] = []
        self._taken: set[fx.Node] = set()  # nodes that an earlier step stands for

    def build(self) -> NativePlan:
        inputs: list[fx.Node] = []
        for node in self._module.graph.nodes:
            if node.op == "placeholder":
                self._maps[node] = self._program.add_map(*self._images[len(inputs)])
                inputs.append(node)
            elif node.op == "call_function" and node not in self._taken:
                self._call(node)
        outputs = output_values(self._module.graph)
        if not inputs or not all(isinstance(x, fx.Node) and x in self._maps for x in outputs):
            raise _Unsupported("an output is no map")
        maps = [self._map(node) for node in outputs]
        if len({x.index for x in maps}) < len(maps) or any(x.packed for x in maps):
            raise _Unsupported("an output is returned twice, or packed")
        if any(self._flat.get(node) for node in outputs):
            raise _Unsupported("a flattened map is returned")
        self._program.finish(
            [self._maps[node] for node in inputs],
            [all(user.target is aten.conv2d.default for user in node.users) for node in inputs],
            maps,
            [node in self._flat for node in outputs],
        )
        return NativePlan(self._program, tuple(self._steps))

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            self._maps[node] = self._maps[source][index]
            return
        handler = _HANDLERS.get(node.target)
        if handler is None:
            raise _Unsupported(f"{node.name} ({node.target}) has no native step")
        handler(self, node, _arguments(node))

    # -- values -----------------------------------------------------------------------------------

    def _map(self, value: Any) -> Map:
        found = self._maps.get(value) if isinstance(value, fx.Node) else None
        if not isinstance(found, Map):
            raise _Unsupported(f"{value} is no map")
        return found

    def _image(self, value: Any) -> Map:
        """Return a float map [N, C, H, W]."""
        found = self._map(value)
        if found.packed or value in self._flat:
            raise _Unsupported(f"{value} is no float map")
        return found

    def _constant(self, value: Any) -> Tensor | None:
        if value is None:
            return None
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            raise _Unsupported(f"{value} is computed from the input")
        tensor: Tensor = get_constant(self._module, str(value.target))
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise _Unsupported(f"{value.target} is {tensor.dtype}")
        return tensor

    def _step(self, *nodes: fx.Node, macs: int | None = None) -> None:
        self._steps.append(NativeStep(nodes, macs))
        self._taken.update(nodes)

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
        dtype = named_arguments(node).get("dtype", torch.float32)
        if want_float and dtype != torch.float32:
            raise _Unsupported(f"{node.name} writes {dtype}")
        residual = None if named.get("residual") is None else self._image(named["residual"])
        source = self._map(named["bits"])
        floats, bits = self._program.conv(
            source,
            geometry,
            epilogue,
            prepack_node(node, weight),
            residual,
            want_float=want_float,
            want_bits=want_bits,
        )
        self._maps[node] = (floats, bits) if want_float and want_bits else floats or bits
        self._step(node, macs=geometry.macs(source.height, source.width))

    def _binarize(self, node: fx.Node, named: dict[str, Any]) -> None:
        threshold, sense = (self._constant(named.get(name)) for name in ("threshold", "sense"))
        self._maps[node] = self._program.binarize(self._image(named["x"]), threshold, sense)
        self._step(node)

    def _bit_pool(self, node: fx.Node, named: dict[str, Any]) -> None:
        pool = Pool2dGeometry(
            kernel_size=tuple(named["kernel_size"]),
            stride=tuple(named["stride"]),
            padding=tuple(named["padding"] or (0, 0)),
        )
        take_and = self._constant(named.get("take_and"))
        self._maps[node] = self._program.bit_pool(self._map(named["bits"]), pool, take_and)
        self._step(node)

    # -- float operators --------------------------------------------------------------------------

    def _conv2d(self, node: fx.Node, named: dict[str, Any]) -> None:
        x, weight = self._image(named["input"]), self._constant(named["weight"])
        assert weight is not None
        if named["groups"] != 1:
            raise _Unsupported(f"{node.name} has groups")
        vertical, horizontal = _pair(named["padding"])
        geometry = Conv2dGeometry(
            in_channels=x.channels,
            out_channels=weight.shape[0],
            kernel_size=(weight.shape[2], weight.shape[3]),
            stride=_pair(named["stride"]),
            padding=(vertical, vertical, horizontal, horizontal),
            dilation=_pair(named["dilation"]),
        )
        nodes, last, options = [node], node, dict[str, Any]()
        pool = _only_user(last)
        if pool is not None and pool.target is aten.max_pool2d.default:
            window = _max_pool(_arguments(pool))
            if window is not None:
                options["pool"], last = window, pool
                nodes.append(pool)
        clamp = _only_user(last)
        if clamp is not None and clamp.target in _CLAMPS:
            options["clamp"], last = _limits(clamp), clamp
            nodes.append(clamp)
        steps = [user for user in last.users if biper_op(user) == "binarize"]
        options["want_float"] = len(last.users) > len(steps[:1])
        if steps:
            bits = _arguments(steps[0])
            options["want_bits"] = True
            options |= {name: self._constant(bits.get(name)) for name in ("threshold", "sense")}
            nodes.append(steps[0])
        floats, packed = self._program.float_conv(
            x, weight, self._constant(named["bias"]), geometry, **options
        )
        self._maps[last] = floats
        if steps:
            self._maps[steps[0]] = packed
        self._step(*nodes)

    def _linear(self, node: fx.Node, named: dict[str, Any]) -> None:
        source = named["input"]
        x, weight = self._map(source), self._constant(named["weight"])
        assert weight is not None
        if source not in self._flat:
            raise _Unsupported(f"{node.name} is applied to a map")
        flattened = self._flat[source]
        if flattened is not None:  # columns in the order of the map's memory
            weight = weight.view(-1, *flattened).permute(0, 2, 3, 1).flatten(1)
        geometry = Conv2dGeometry(
            in_channels=x.channels, out_channels=len(weight), kernel_size=(1, 1)
        )
        out, _ = self._program.float_conv(
            x, weight[:, :, None, None], self._constant(named["bias"]), geometry
        )
        self._maps[node], self._flat[node] = out, None
        self._step(node)

    def _reshape(self, node: fx.Node, named: dict[str, Any]) -> None:
        source, sizes = named["self"], list(named["shape"])
        x = self._map(source)
        if x.packed or self._flat.get(source) is not None:
            raise _Unsupported(f"{node.name} rearranges a map")
        values = x.channels * x.height * x.width
        if sizes == [-1, values]:
            moved = x.height * x.width > 1
            self._flat[node] = (x.channels, x.height, x.width) if moved else None
            self._maps[node] = self._program.view(x, values, 1, 1)
        elif sizes == [-1, values, 1, 1] and x.height * x.width == 1:
            self._maps[node] = x
        else:
            raise _Unsupported(f"{node.name} rearranges a map")
        self._taken.add(node)

    def _max_pool2d(self, node: fx.Node, named: dict[str, Any]) -> None:
        x, window = self._image(named["self"]), _max_pool(named)
        if window is None:
            raise _Unsupported(f"{node.name} has dilation or ceil_mode")
        size = window.output_size(x.height, x.width)
        self._maps[node] = self._program.maximum(
            x, window.kernel_size, window.stride, window.padding, size
        )
        self._step(node)

    def _average(self, node: fx.Node, x: Map, window: Any, **options: Any) -> None:
        """Add a pool and the zero channels behind it."""
        nodes, last = [node], node
        pad = _only_user(node)
        channels = _padded_channels(pad) if pad is not None else None
        if pad is not None and channels is not None:
            options |= dict(zip(("channels_before", "channels_after"), channels, strict=True))
            nodes.append(pad)
            last = pad
        self._maps[last] = self._program.average(x, *window, **options)
        self._step(*nodes)

    def _avg_pool2d(self, node: fx.Node, named: dict[str, Any]) -> None:
        x = self._image(named["self"])
        kernel, padding = _pair(named["kernel_size"]), _pair(named["padding"])
        stride = _pair(named["stride"]) if named["stride"] else kernel
        size = (
            pool_positions(x.height, kernel[0], stride[0], padding[0], named["ceil_mode"]),
            pool_positions(x.width, kernel[1], stride[1], padding[1], named["ceil_mode"]),
        )
        self._average(
            node,
            x,
            (kernel, stride, padding, size),
            count_padding=named["count_include_pad"],
            divisor=named["divisor_override"] or 0,
        )

    def _mean(self, node: fx.Node, named: dict[str, Any]) -> None:
        x = self._image(named["self"])
        if sorted(d % 4 for d in named["dim"] or ()) != [2, 3] or named["dtype"] is not None:
            raise _Unsupported(f"{node.name} is no mean over height and width")
        self._whole_map(node, x, keepdim=named["keepdim"])

    def _adaptive(self, node: fx.Node, named: dict[str, Any]) -> None:
        if list(named["output_size"]) != [1, 1]:
            raise _Unsupported(f"{node.name} is no mean over height and width")
        self._whole_map(node, self._image(named["self"]), keepdim=True)

    def _whole_map(self, node: fx.Node, x: Map, *, keepdim: bool) -> None:
        whole = (x.height, x.width)
        self._maps[node] = self._program.average(x, whole, whole, (0, 0), (1, 1))
        if not keepdim:
            self._flat[node] = None
        self._step(node)

    def _pad(self, node: fx.Node, named: dict[str, Any]) -> None:
        channels = _padded_channels(node)
        if channels is None:
            raise _Unsupported(f"{node.name} pads other than channels with zeros")
        x = self._image(named["self"])
        self._maps[node] = self._program.average(
            x,
            (1, 1),
            (1, 1),
            (0, 0),
            (x.height, x.width),
            channels_before=channels[0],
            channels_after=channels[1],
        )
        self._step(node)

    def _clamp(self, node: fx.Node, named: dict[str, Any]) -> None:
        self._maps[node] = self._program.sum(self._image(named["self"]), None, _limits(node))
        self._step(node)

    def _add(self, node: fx.Node, named: dict[str, Any]) -> None:
        a, b = self._image(named["self"]), self._image(named["other"])
        if named["alpha"] != 1 or (a.channels, a.height, a.width) != (
            b.channels,
            b.height,
            b.width,
        ):
            raise _Unsupported(f"{node.name} is no sum of two maps of one shape")
        nodes, last, clamp = [node], node, Clamp()
        behind = _only_user(node)
        if behind is not None and behind.target in _CLAMPS:
            clamp, last = _limits(behind), behind
            nodes.append(behind)
        self._maps[last] = self._program.sum(a, b, clamp)
        self._step(*nodes)


def _arguments(node: fx.Node) -> dict[str, Any]:
    assert isinstance(node.target, OpOverload)
    return with_defaults(node.target, node.args, node.kwargs)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _pair(value: Any) -> tuple[int, int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values[0], values[-1]


def _max_pool(named: dict[str, Any]) -> Pool2dGeometry | None:
    """Return a max pool's geometry; None where it has dilation or ceil_mode."""
    if named["ceil_mode"] or _pair(named["dilation"]) != (1, 1):
        return None
    kernel = _pair(named["kernel_size"])
    stride = _pair(named["stride"]) if named["stride"] else kernel
    return Pool2dGeometry(kernel_size=kernel, stride=stride, padding=_pair(named["padding"]))


def _limits(node: fx.Node) -> Clamp:
    named = _arguments(node)
    if node.target is aten.relu.default:
        return Clamp(low=0.0)
    names = ("min_val", "max_val") if node.target is aten.hardtanh.default else ("min", "max")
    low, high = (named[name] for name in names)
    return Clamp(-math.inf if low is None else low, math.inf if high is None else high)


def _padded_channels(node: fx.Node) -> tuple[int, int] | None:
    """Return the zero channels that a pad adds before and after, None for any other node."""
    if node.target is not aten.constant_pad_nd.default:
        return None
    named = _arguments(node)
    pad = list(named["pad"])
    if len(pad) != 6 or any(pad[:4]) or min(pad) < 0 or named["value"] not in (0, None):
        return None
    return pad[4], pad[5]


_HANDLERS: dict[Any, Callable[[_Builder, fx.Node, dict[str, Any]], None]] = {
    torch.ops.biper.bconv2d_float.default: _Builder._bconv,
    torch.ops.biper.bconv2d_bits.default: _Builder._bconv,
    torch.ops.biper.bconv2d_float_bits.default: _Builder._bconv,
    torch.ops.biper.binarize.default: _Builder._binarize,
    torch.ops.biper.bmaxpool2d.default: _Builder._bit_pool,
    aten.conv2d.default: _Builder._conv2d,
    aten.linear.default: _Builder._linear,
    aten.reshape.default: _Builder._reshape,
    aten.max_pool2d.default: _Builder._max_pool2d,
    aten.avg_pool2d.default: _Builder._avg_pool2d,
    aten.mean.dim: _Builder._mean,
    aten._adaptive_avg_pool2d.default: _Builder._adaptive,
    aten.constant_pad_nd.default: _Builder._pad,
    aten.hardtanh.default: _Builder._clamp,
    aten.clamp.default: _Builder._clamp,
    aten.relu.default: _Builder._clamp,
    aten.add.Tensor: _Builder._add,
}
