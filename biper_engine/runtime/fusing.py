"""Fuses the float ends of a network, for plans of devices whose backends have fused operators.

A convolution of few channels, the normalisation of the images before it, and the max pool, clamp
and bits after it become one `biper::stem` or `biper::stem_bits`; the mean of a map and the linear
layer after it become `biper::pooled_linear`. The graph of a network itself never changes; files,
reports and proofs refer to that graph.

A fused operator rounds less often than the operators that it replaces. It normalises images with
one fused multiply-add in float32 for any number of steps, and the bits of a half-precision stem
come from its float32 sums, as in every binary convolution.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.graph.patterns import (
    ConvTail,
    conv2d_geometry,
    drops_pixels,
    is_mean_of_pixels,
    pair,
    per_channel,
    tail_of,
)
from biper_engine.graph.portable import release_source
from biper_engine.graph.reading import arguments, get_constant, is_call, output_values
from biper_engine.graph.shapes import BATCH, values_without_data
from biper_engine.graph.signature import InputSpec
from biper_engine.ops.backends import by_name, forced_name, select
from biper_engine.ops.functional import stem_options
from biper_engine.ops.stem import (
    MAX_POOLED_CHANNELS,
    MAX_STEM_CHANNELS,
    MAX_STEM_WEIGHTS,
    PLAN_OPERATORS,
    Stem,
)

__all__ = ["fuse_ends"]

_aten = torch.ops.aten

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ARITHMETIC = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor)


def fuse_ends(
    module: fx.GraphModule,
    device: torch.device | None,
    inputs: Sequence[InputSpec] | None,
    *,
    ops: Collection[str] | None = None,
) -> fx.GraphModule:
    """Return a network with its float ends fused if a backend supports that on `device`.

    The result shares the tensors of `module`, except for those of the fused operators; it is
    `module` itself if there is nothing to fuse.

    Args:
        module: a converted network; it does not change.
        device: device of its tensors.
        inputs: its inputs; without them nothing is fused.
        ops: names of the fused operators to use; None means those of the backend that is forced or
            would be chosen. The reference, which has all of them, counts only if it is forced on a
            device other than the CPU: unforced it is not faster than PyTorch's own operators, and
            on the CPU it runs the graph unchanged.
    """
    if device is None or inputs is None:
        return module
    if ops is None:
        ops = {op for op in PLAN_OPERATORS if _is_fused(op, device)}
    if not ops:
        return module
    # A plan outlives the mode of the call that makes it, so it must not hold inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        fusion = _Fusion(module, inputs, ops)
        fusion.fuse_stems()
        fusion.fuse_classifiers()
        return fusion.finish()


def _is_fused(op: str, device: torch.device) -> bool:
    forced, on_cpu = forced_name(), device.type == "cpu"
    if forced is None:
        return not on_cpu and select(op, None, device).name != "reference"
    if forced == "reference" and on_cpu:
        return False
    return by_name(forced).unsupported_reason(op, None, device) is None


def _is_constant(value: Any) -> bool:
    return value is None or (isinstance(value, fx.Node) and value.op == "get_attr")


def _means_whole_map(node: fx.Node, x: Tensor) -> bool:
    """Whether a node is the mean of the map `x` over all its pixels."""
    if is_mean_of_pixels(node):
        return True
    if is_call(node, _aten._adaptive_avg_pool2d.default):
        return tuple(arguments(node)["output_size"]) == (1, 1)
    if not is_call(node, _aten.avg_pool2d.default):
        return False
    named = arguments(node)
    whole = pair(named["kernel_size"]) == tuple(x.shape[2:])
    return whole and pair(named["padding"]) == (0, 0) and named["divisor_override"] is None


# -- an affine function of every channel ----------------------------------------------------------


@dataclass(frozen=True)
class _Affine:
    """x * scale[c] + offset[c], in float64."""

    scale: Tensor
    offset: Tensor

    @staticmethod
    def identity(channels: int) -> _Affine:
        scale = torch.ones(channels, dtype=torch.float64)
        return _Affine(scale, torch.zeros_like(scale))

    @property
    def is_identity(self) -> bool:
        return bool((self.scale == 1).all()) and not bool(self.offset.any())

    def after(self, first: _Affine) -> _Affine:
        """Return this function applied to the result of `first`."""
        return _Affine(self.scale * first.scale, self.scale * first.offset + self.offset)


class _Fusion:
    """A copy of a graph with fused operators."""

    def __init__(
        self, module: fx.GraphModule, inputs: Sequence[InputSpec], ops: Collection[str]
    ) -> None:
        self._module = module
        self._ops = ops
        self._graph = fx.Graph()
        self._constants: dict[str, Any] = {}
        self._values: dict[fx.Node, Any] = {}
        self._changed = False
        values = values_without_data(module, inputs)
        copies: dict[fx.Node, fx.Node] = {}
        for node in module.graph.nodes:
            if node.op == "output":
                outputs = tuple(output_values(module.graph))
                self._graph.output(fx.node.map_arg(outputs, copies.__getitem__))
                break
            copies[node] = self._graph.node_copy(node, copies.__getitem__)
            self._values[copies[node]] = values[node]
            if node.op == "get_attr":
                self._constants[str(node.target)] = get_constant(module, str(node.target))

    def finish(self) -> fx.GraphModule:
        if not self._changed:
            return self._module
        self._graph.eliminate_dead_code()
        used = {str(node.target) for node in self._graph.find_nodes(op="get_attr")}
        kept = {target: value for target, value in self._constants.items() if target in used}
        return release_source(fx.GraphModule(kept, self._graph))

    # -- stems ------------------------------------------------------------------------------------

    def fuse_stems(self) -> None:
        for node in self._graph.find_nodes(op="call_function", target=_aten.conv2d.default):
            self._fuse_stem(node)

    def _fuse_stem(self, conv: fx.Node) -> None:
        stem = self._stem_of(conv)
        if stem is None:
            return
        images, stem = self._take_images(arguments(conv)["input"], stem)
        tail = tail_of(conv)
        last = tail.nodes[-1] if tail.nodes else conv
        stem = self._take_tail(tail, stem)
        want_float = len(last.users) > len(tail.bits)
        op = "stem" if want_float else "stem_bits"
        alone = not tail.bits and not tail.nodes and stem.scale is None
        if alone or op not in self._ops:
            return
        target = getattr(torch.ops.biper, op).default
        with self._graph.inserting_before(conv):
            fused = self._call(f"{conv.name}_{op}", target, images, stem_options(stem))
            floats, bits = fused, fused
            if want_float:
                floats = self._graph.call_function(operator.getitem, (fused, 0))
                bits = self._graph.call_function(operator.getitem, (fused, 1))
        for binarize in tail.bits:
            binarize.replace_all_uses_with(bits)
            self._graph.erase_node(binarize)
        if want_float:
            last.replace_all_uses_with(floats)
        self._changed = True

    def _stem_of(self, conv: fx.Node) -> Stem | None:
        """Return a convolution as a stem, or None if it is not a convolution of images."""
        named = arguments(conv)
        weight, bias = (self._constant(named[name]) for name in ("weight", "bias"))
        if (
            weight is None
            or not _is_constant(named["bias"])
            or not isinstance(named["input"], fx.Node)
        ):
            return None
        fits = weight.dim() == 4 and weight.numel() > 0 and weight.shape[1] <= MAX_STEM_CHANNELS
        if not fits or weight[0].numel() > MAX_STEM_WEIGHTS or weight.dtype not in _FLOATS:
            return None
        geometry = conv2d_geometry(conv, weight)
        if geometry.groups != 1 or geometry.dilation != (1, 1):
            return None
        if not isinstance(self._values[conv], Tensor) or self._values[conv].dim() != 4:
            return None
        return Stem(
            weight=weight.float().contiguous(),
            bias=None if bias is None else bias.float(),
            stride=geometry.stride,
            padding=geometry.padding,
            compute_dtype=weight.dtype,
        )

    def _take_images(self, node: fx.Node, stem: Stem) -> tuple[fx.Node, Stem]:
        """Return the images before conversions and per-channel constants, and these as the stem's.

        Both stay in the graph if the images are neither floats nor bytes.
        """
        channels = stem.weight.shape[1]
        start, steps = node, _Affine.identity(channels)
        while node.op == "call_function":
            if node.target is _aten._to_copy.default and set(node.kwargs) <= {"dtype"}:
                if node.kwargs.get("dtype") not in _FLOATS:
                    break
                node = node.all_input_nodes[0]
                continue
            step = self._affine_step(node, channels, 4)
            if step is None:
                break
            node, function = step
            steps = steps.after(function)
        images = self._values[node]
        usable = isinstance(images, Tensor) and images.dim() == 4 and images.shape[1] == channels
        if not usable or images.dtype not in (*_FLOATS, torch.uint8):
            return start, stem
        if steps.is_identity:
            return node, stem
        device = stem.weight.device
        scale, offset = (value.float().to(device) for value in (steps.scale, steps.offset))
        return node, replace(stem, scale=scale, offset=offset)

    def _take_tail(self, tail: ConvTail, stem: Stem) -> Stem:
        """Return a stem with the operators after its convolution."""
        low, high = tail.limits
        stem = replace(
            stem,
            pool=tail.pool,
            clamp_min=None if low == -math.inf else low,
            clamp_max=None if high == math.inf else high,
        )
        if not tail.bits:
            return stem
        named = arguments(tail.bits[0])
        threshold, sense = (self._constant(named[name]) for name in ("threshold", "sense"))
        return replace(stem, threshold=threshold, sense=sense)

    # -- classifiers ------------------------------------------------------------------------------

    def fuse_classifiers(self) -> None:
        if "pooled_linear" not in self._ops:
            return
        for node in self._graph.find_nodes(op="call_function", target=_aten.linear.default):
            self._fuse_classifier(node)

    def _fuse_classifier(self, linear: fx.Node) -> None:
        named = arguments(linear)
        weight, bias = (self._constant(named[name]) for name in ("weight", "bias"))
        if weight is None or not _is_constant(named["bias"]) or weight.dtype not in _FLOATS:
            return
        found = self._mean_behind(named["input"], weight.shape[1])
        if found is None:
            return
        x, steps = found
        value = self._values[x]
        if value.dtype != weight.dtype:
            return
        if not steps.is_identity:
            exact, device = weight.double(), weight.device
            added = exact @ steps.offset.to(device)
            bias = (added if bias is None else bias.double() + added).float()
            weight = (exact * steps.scale.to(device)).float()
        with self._graph.inserting_before(linear):
            fused = self._call(
                f"{linear.name}_pooled",
                torch.ops.biper.pooled_linear.default,
                x,
                {"weight": weight, "bias": bias},
            )
        linear.replace_all_uses_with(fused)
        self._graph.erase_node(linear)
        self._changed = True

    def _mean_behind(self, node: Any, channels: int) -> tuple[fx.Node, _Affine] | None:
        """Return the map whose mean is `node`, and the function of every channel in between."""
        steps = _Affine.identity(channels)
        while isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1:
            source = node.all_input_nodes[0] if node.all_input_nodes else node
            x = self._values[source]
            if isinstance(x, Tensor) and x.dim() == 4 and _means_whole_map(node, x):
                fits = x.shape[0] == BATCH and x.shape[1] == channels and x.dtype in _FLOATS
                fits = fits and channels <= MAX_POOLED_CHANNELS
                return (source, steps) if fits else None
            if self._flattens(node, channels):
                node = source
                continue
            value = self._values[node]
            step = self._affine_step(node, channels, value.dim() if value is not None else 0)
            if step is None:
                return None
            node, function = step
            steps = steps.after(function)
        return None

    def _flattens(self, node: fx.Node, channels: int) -> bool:
        """Whether a node only reshapes [N, C, 1, 1] to [N, C]."""
        if node.target not in (_aten.reshape.default, _aten.squeeze.dims):
            return False
        before, after = (_shape_of(self._values[x]) for x in (node.all_input_nodes[0], node))
        if before is None or after != (BATCH, channels):
            return False
        return before == after or drops_pixels(before, after)

    # -- constants --------------------------------------------------------------------------------

    def _affine_step(
        self, node: fx.Node, channels: int, dims: int
    ) -> tuple[fx.Node, _Affine] | None:
        """Return the operand of a sum or product with constants, and the function per channel."""
        result = self._values[node]
        if node.target not in _ARITHMETIC or dims not in (2, 4) or result is None:
            return None
        if result.dtype not in _FLOATS:  # bytes wrap around
            return None
        named = arguments(node)
        left, right = named["self"], named["other"]
        swapped = isinstance(right, fx.Node) and right.op != "get_attr"
        flowing, held = (right, left) if swapped else (left, right)
        if (
            not isinstance(flowing, fx.Node)
            or flowing.op == "get_attr"
            or _shape_of(self._values[flowing]) != tuple(result.shape)
        ):
            return None
        constant = self._constant(held) if isinstance(held, fx.Node) else held
        value = per_channel(constant, channels, dims)
        if value is None or (swapped and node.target is _aten.div.Tensor):
            return None
        one = torch.ones_like(value)
        zero = torch.zeros_like(value)
        alpha = float(named.get("alpha", 1))
        if node.target is _aten.mul.Tensor:
            return flowing, _Affine(value, zero)
        if node.target is _aten.div.Tensor:
            return flowing, _Affine(one / value, zero)
        sign = -1.0 if node.target is _aten.sub.Tensor else 1.0
        if swapped:
            return flowing, _Affine(sign * alpha * one, value)
        return flowing, _Affine(one, sign * alpha * value)

    def _constant(self, value: Any) -> Tensor | None:
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        tensor: Tensor = self._constants[str(value.target)]
        return tensor

    def _call(self, name: str, target: Any, x: fx.Node, options: dict[str, Any]) -> fx.Node:
        """Create a call whose tensors are constants of the graph."""
        arguments: dict[str, Any] = {}
        for key, value in options.items():
            arguments[key] = value
            if isinstance(value, Tensor):
                constant = f"{name}_{key}"
                self._constants[constant] = value
                arguments[key] = self._graph.create_node("get_attr", constant, name=constant)
        return self._graph.create_node("call_function", target, (x,), arguments, name=name)


def _shape_of(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
