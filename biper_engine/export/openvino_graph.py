"""Translate an engine's graph to an OpenVINO graph with opset1 BinaryConvolutions.

OpenVINO makes no such graph from a model by itself, so it is built node by node. Its CPU plugin
convolves bits if a FakeQuantize of two levels comes before a BinaryConvolution.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from biper_engine.bits import unpack_weight
from biper_engine.errors import ExportError
from biper_engine.export.openvino_bits import Bits, channel_values, signed_pool
from biper_engine.geometry import Conv2dGeometry
from biper_engine.graph.operators import name_of
from biper_engine.graph.reading import interpret, output_values
from biper_engine.ops.epilogue import SUMS, Epilogue
from biper_engine.ops.reference import sums_of
from biper_engine.ops.registration import split_options

__all__ = ["Translated", "binary_model", "translate"]

_LARGEST = torch.finfo(torch.float32).max
_BYTE = 8
_RENAMED = {"self": "x", "input": "x", "min_val": "min", "max_val": "max"}


@dataclass(frozen=True)
class Translated:
    """A graph as OpenVINO nodes.

    Attributes:
        model: an `openvino.Model` of the graph's inputs and outputs.
        signs: what becomes packed maps, in order: float maps with the rules of their bits.
        float_layers: a line for each binary convolution that OpenVINO has in float only.
    """

    model: Any
    signs: Sequence[Bits]
    float_layers: Sequence[str]


def translate(
    graph_module: fx.GraphModule, shapes: Sequence[Sequence[int]], *, bits_only: bool = False
) -> Translated:
    """Return what an engine's graph computes, as an OpenVINO model.

    The bits equal the engine's if the floats before them do. Everything except the binary
    convolutions is float32.

    Args:
        graph_module: the graph of an engine.
        shapes: the shape of each input; -1 is any size.
        bits_only: whether to refuse a binary convolution that OpenVINO does not support on bits, or
            gets wrong: one with groups, or with channels that do not fill bytes.

    Raises:
        ExportError: the graph has an operator that is not translated.
    """
    import openvino as ov
    from openvino import opset1

    names = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
    inputs = [opset1.parameter(ov.PartialShape(list(shape)), np.float32) for shape in shapes]
    for name, made in zip(names, inputs, strict=True):
        made.set_friendly_name(name)
        made.output(0).set_names({name})
    translation = _Translation(ov, opset1, bits_only)
    outputs = interpret(graph_module, inputs, translation)
    results = [opset1.result(node) for node in outputs]
    for at, result in enumerate(results):
        result.output(0).set_names({"output" if len(results) == 1 else f"output_{at}"})
    model = ov.Model(results, inputs, "engine")
    return Translated(model, translation.signs, translation.float_layers)


def binary_model(graph_module: fx.GraphModule, shape: Sequence[int]) -> Any:
    """Return an `openvino.Model` whose binary convolutions all run on bits.

    Args:
        graph_module: the graph of an engine that takes one tensor and returns one.
        shape: the shape of the images, including the batch.

    Raises:
        ExportError: as for `translate`.
    """
    outputs = len(output_values(graph_module.graph))
    if outputs != 1:
        raise ExportError(f"the network returns {outputs} tensors, not one")
    return translate(graph_module, [shape], bits_only=True).model


def _obstacle(geometry: Conv2dGeometry) -> str | None:
    """Return why OpenVINO cannot convolve bits, or None."""
    if geometry.groups != 1:
        return f"OpenVINO has no binary convolution with groups; this one has {geometry.groups}"
    if geometry.in_channels % _BYTE:
        return (
            "OpenVINO's binary convolution is wrong if channels do not fill bytes; this one has "
            f"{geometry.in_channels}"
        )
    return None


def _window(geometry: Conv2dGeometry) -> tuple[list[int], ...]:
    """Return strides, padding in front, padding behind and dilations."""
    top, bottom, left, right = geometry.padding
    return list(geometry.stride), [top, left], [bottom, right], list(geometry.dilation)


def _rank(x: Any) -> int:
    return int(x.get_output_partial_shape(0).rank.get_length())


def _size(x: Any, dimension: int) -> int:
    return int(x.get_output_partial_shape(0)[dimension].get_length())


class _Translation:
    """Gives `interpret` an OpenVINO node, or bits, for every call of the graph."""

    def __init__(self, ov: Any, opset: Any, bits_only: bool) -> None:
        self._ov, self._opset, self._bits_only = ov, opset, bits_only
        self._layer = ""
        self.signs: list[Bits] = []
        self.float_layers: list[str] = []
        aten, biper = torch.ops.aten, torch.ops.biper
        self._rules: dict[Any, Callable[..., Any]] = {
            aten.clone.default: lambda x, memory_format=None: x,
            aten.conv2d.default: self._convolution,
            aten.linear.default: self._linear,
            aten.batch_norm.default: self._batch_norm,
            aten.max_pool2d.default: self._max_pool,
            aten.avg_pool2d.default: self._avg_pool,
            aten.mean.dim: self._mean,
            aten.add.Tensor: self._add,
            aten.sub.Tensor: self._subtract,
            aten.mul.Tensor: self._binary(opset.multiply),
            aten.div.Tensor: self._binary(opset.divide),
            aten.maximum.default: self._binary(opset.maximum),
            aten.neg.default: lambda x: opset.negative(x),
            aten.slice.Tensor: self._slice,
            aten.cat.default: lambda tensors, dim=0: opset.concat(
                [self._operand(x) for x in tensors], dim
            ),
            aten.sigmoid.default: lambda x: opset.sigmoid(x),
            aten.hardtanh.default: self._clamp,
            aten.clamp.default: self._clamp,
            aten.relu.default: lambda x: opset.relu(x),
            aten._prelu_kernel.default: lambda x, weight: opset.prelu(x, self._operand(weight)),
            aten.constant_pad_nd.default: self._pad,
            aten.reshape.default: self._reshape,
            biper.binarize.default: self._binarize,
            biper.bmaxpool2d.default: self._bit_pool,
            biper.bconv2d_float.default: self._binary_convolution,
            biper.bconv2d_bits.default: self._to_bits,
            biper.bconv2d_float_bits.default: self._to_both,
        }

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.target is operator.getitem:
            return args[0][args[1]]
        rule = self._rules.get(node.target)
        if rule is None:
            raise ExportError(
                f"The operator {name_of(node)} is not translated to OpenVINO, so nothing was "
                "written; format='onnx' has more operators, and OpenVINO reads its files, too."
            )
        self._layer = node.name
        assert isinstance(node.target, OpOverload)
        names = [argument.name for argument in node.target._schema.arguments]
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        # ATen calls its first argument `self` or `input`; a method has its own `self`.
        return rule(**{_RENAMED.get(name, name): value for name, value in named.items()})

    def _constant(self, values: Tensor) -> Any:
        return self._opset.constant(np.array(values.detach().float().numpy()))

    def _integers(self, values: Sequence[int]) -> Any:
        return self._opset.constant(np.array(values, np.int64))

    def _affine(self, x: Any, multiplier: Tensor, bias: Tensor) -> Any:
        """Multiply and add per channel, dimension 1."""
        shape = (1, -1, *[1] * (_rank(x) - 2))
        scaled = self._opset.multiply(x, self._constant(multiplier.reshape(shape)))
        return self._opset.add(scaled, self._constant(bias.reshape(shape)))

    # -- float operators: arguments are those of ATen ------------------------------------------

    def _convolution(
        self,
        x: Any,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> Any:
        options = (list(stride), list(padding), list(padding), list(dilation))
        if groups == 1:
            y = self._opset.convolution(x, self._constant(weight), *options)
        else:
            grouped = weight.reshape(groups, -1, *weight.shape[1:])
            y = self._opset.group_convolution(x, self._constant(grouped), *options)
        return y if bias is None else self._opset.add(y, channel_values(bias))

    def _linear(self, x: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
        y = self._opset.matmul(x, self._constant(weight), False, True)
        return y if bias is None else self._opset.add(y, self._constant(bias))

    def _batch_norm(
        self,
        x: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        **_: Any,
    ) -> Any:
        scale = (running_var.double() + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -running_mean * scale
        return self._affine(x, scale, shift if bias is None else shift + bias)

    def _max_pool(
        self,
        x: Any,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        ceil_mode: bool = False,
    ) -> Any:
        if ceil_mode or any(step != 1 for step in dilation):
            raise ExportError("a max pool with dilation or ceil_mode is not translated")
        strides, pads = list(stride or kernel_size), list(padding)
        return self._opset.max_pool(x, strides, pads, pads, list(kernel_size))

    def _avg_pool(
        self,
        x: Any,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0, 0),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        if ceil_mode or divisor_override is not None:
            raise ExportError("ceil_mode and divisor_override of an average pool")
        strides, pads = list(stride or kernel_size), list(padding)
        exclude = not count_include_pad
        return self._opset.avg_pool(x, strides, pads, pads, list(kernel_size), exclude)

    def _mean(self, x: Any, dim: Sequence[int], keepdim: bool = False) -> Any:
        return self._opset.reduce_mean(x, self._integers(dim), keepdim)

    def _operand(self, value: Any) -> Any:
        """Return a node, a tensor or a number as a node."""
        if isinstance(value, int | float):
            value = torch.tensor(float(value))
        return self._constant(value) if isinstance(value, Tensor) else value

    def _binary(self, node: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        return lambda x, other: node(self._operand(x), self._operand(other))

    def _add(self, x: Any, other: Any, alpha: float = 1) -> Any:
        term = self._operand(other)
        term = term if alpha == 1 else self._opset.multiply(term, self._operand(alpha))
        return self._opset.add(self._operand(x), term)

    def _subtract(self, x: Any, other: Any, alpha: float = 1) -> Any:
        return self._add(x, other, -alpha)

    def _clamp(self, x: Any, min: float | None = None, max: float | None = None) -> Any:
        low = -_LARGEST if min is None else builtins.max(min, -_LARGEST)
        high = _LARGEST if max is None else builtins.min(max, _LARGEST)
        return self._opset.clamp(x, low, high)

    def _pad(self, x: Any, pad: Sequence[int], value: float = 0) -> Any:
        # ATen's pairs start at the last dimension; the first dimensions have none.
        pairs = [*zip(pad[::2], pad[1::2], strict=True)]
        pairs = [*pairs, *[(0, 0)] * (_rank(x) - len(pairs))][::-1]
        begin, end = (self._integers(sizes) for sizes in zip(*pairs, strict=True))
        filler = self._constant(torch.tensor(float(value)))
        return self._opset.pad(x, begin, end, "constant", filler)

    def _slice(
        self, x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
    ) -> Any:
        rank = _rank(x)
        dim %= rank
        begins, ends, steps = [0] * rank, [0] * rank, [1] * rank
        begins[dim], ends[dim], steps[dim] = start or 0, 0 if end is None else end, step
        sizes = [self._integers(values) for values in (begins, ends, steps)]
        whole = [int(i != dim) for i in range(rank)]
        to_the_end = [int(i != dim or end is None) for i in range(rank)]
        return self._opset.strided_slice(x, *sizes, whole, to_the_end)

    def _reshape(self, x: Any, shape: Sequence[int]) -> Any:
        return self._opset.reshape(x, self._integers(shape), False)

    # -- binary operators: arguments are those of biper ----------------------------------------

    def _binarize(
        self, x: Any, threshold: Tensor | None = None, sense: Tensor | None = None
    ) -> Bits:
        channels = _size(x, 1)
        threshold = torch.zeros(channels) if threshold is None else threshold
        sense = torch.zeros(channels, dtype=torch.bool) if sense is None else sense
        self.signs.append(Bits(self._opset, x, threshold, sense))
        return self.signs[-1]

    def _bit_pool(
        self,
        bits: Bits,
        channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int] = (0, 0),
        take_and: Tensor | None = None,
    ) -> Bits:
        return bits.pooled(lambda x: self._max_pool(x, kernel_size, stride, padding), take_and)

    def _to_bits(self, threshold: Tensor, sense: Tensor, **options: Any) -> Bits:
        return self._binarize(self._binary_convolution(**options), threshold, sense)

    def _to_both(self, threshold: Tensor, sense: Tensor, **options: Any) -> tuple[Any, Bits]:
        floats = self._binary_convolution(**options)
        return floats, self._binarize(floats, threshold, sense)

    def _binary_convolution(
        self,
        bits: Bits,
        weight: Tensor,
        multiplier: Tensor,
        bias: Tensor,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Any:
        geometry, epilogue, residual, _ = split_options(weight, multiplier, bias, options)
        dot = self._sums_of_products(bits, weight, geometry)
        sums = self._sums(bits, weight, geometry, epilogue)
        return self._epilogue(dot, sums, epilogue, residual, options.get("gate"))

    def _sums(
        self, bits: Bits, weight: Tensor, geometry: Conv2dGeometry, epilogue: Epilogue
    ) -> list[tuple[Any, Tensor]]:
        """Return the sums of window and weights that an epilogue has, each with its factor."""
        factors = {name: getattr(epilogue, name) for name in SUMS}
        factors = {name: factor for name, factor in factors.items() if factor is not None}
        if not factors:
            return []
        signs = unpack_weight(weight, geometry.group_channels).float() * 2 - 1
        size = [_size(bits.source, dimension) for dimension in (2, 3)]
        known = sums_of(torch.ones(1, geometry.in_channels, *size), signs, geometry)
        sums = {name: self._constant(value) for name, value in known.items()}
        if "window" in factors:  # that of the input, which is known in a call only
            ones = torch.ones_like(signs[:1] if geometry.groups == 1 else signs)
            sums["window"] = self._float_convolution(bits, ones, geometry)
        return [(sums[name], factor) for name, factor in factors.items()]

    def _sums_of_products(self, bits: Bits, weight: Tensor, geometry: Conv2dGeometry) -> Any:
        """Return the accumulators, from bits or, where OpenVINO cannot, from floats of -1 and 1."""
        obstacle = _obstacle(geometry)
        if obstacle is None:
            return self._opset.binary_convolution(
                *(bits.node, self._weights(weight, geometry, bits.sense), *_window(geometry)),
                *("xnor-popcount", 0.0),  # padding adds 0, neither 1 nor -1
            )
        if self._bits_only:
            raise ExportError(obstacle)
        self.float_layers.append(f"{self._layer}: {obstacle}")
        signs = unpack_weight(weight, geometry.group_channels).float() * 2 - 1
        return self._float_convolution(bits, signs, geometry)

    def _float_convolution(self, bits: Bits, weight: Tensor, geometry: Conv2dGeometry) -> Any:
        """Convolve -1 and 1 in float; the sums are exact."""
        window = _window(geometry)
        if geometry.groups == 1:
            return self._opset.convolution(bits.floats, self._constant(weight), *window)
        grouped = weight.reshape(geometry.groups, -1, *weight.shape[1:])
        return self._opset.group_convolution(bits.floats, self._constant(grouped), *window)

    def _weights(self, weight: Tensor, geometry: Conv2dGeometry, inverted: Tensor) -> Any:
        """Return weight bits; if the activation's bit is inverted, so is the weight's."""
        positive = unpack_weight(weight, geometry.in_channels) ^ inverted.view(1, -1, 1, 1)
        packed = np.packbits(positive.numpy().reshape(-1), bitorder="little")
        shape = self._ov.Shape(list(positive.shape))
        tensor = self._ov.Tensor(packed, shape, self._ov.Type.u1)
        # The array is freed when this returns: a constant that shares its memory would be garbage.
        return self._ov.op.Constant(tensor, shared_memory=False)

    def _epilogue(
        self,
        dot: Any,
        sums: Sequence[tuple[Any, Tensor]],
        epilogue: Epilogue,
        residual: Any,
        gate: Any,
    ) -> Any:
        """Return v of `biper_engine.ops.epilogue`; multiply-adds are rounded twice."""
        v = self._affine(dot, epilogue.multiplier, epilogue.bias)
        for total, factor in sums:
            v = self._opset.add(v, self._opset.multiply(total, channel_values(factor)))
        if not epilogue.pool.is_identity:
            v = self._pooled(v, epilogue)
        if gate is not None:
            v = self._opset.multiply(v, self._gate(gate))
            if epilogue.offset is not None:
                v = self._opset.add(v, channel_values(epilogue.offset))
        if residual is not None:
            v = self._opset.add(v, residual)
        if epilogue.clamp_min is not None or epilogue.clamp_max is not None:
            v = self._clamp(v, epilogue.clamp_min, epilogue.clamp_max)
        if epilogue.gain is not None:
            negative = self._opset.minimum(v, self._constant(torch.zeros(1, 1, 1, 1)))
            positive = self._opset.multiply(self._opset.relu(v), channel_values(epilogue.gain))
            slope = torch.ones_like(epilogue.gain) if epilogue.slope is None else epilogue.slope
            v = self._opset.add(positive, self._opset.multiply(negative, channel_values(slope)))
        elif epilogue.slope is not None:
            v = self._opset.prelu(v, self._constant(epilogue.slope))
        if epilogue.shift is not None:
            v = self._opset.add(v, channel_values(epilogue.shift))
        return v

    def _gate(self, gate: Any) -> Any:
        """Return a gate, [N, C] or [N, C, 1, 1], as [N, C, 1, 1]."""
        node = self._constant(gate) if isinstance(gate, Tensor) else gate
        return node if _rank(node) == 4 else self._opset.unsqueeze(node, self._integers([2, 3]))

    def _pooled(self, v: Any, epilogue: Epilogue) -> Any:
        """Pool behind the multiply-add, which OpenVINO fuses into the convolution.

        The accumulator that the pool takes has the largest v if the multiplier keeps the order and
        the pool takes the maximum, or if neither is true; otherwise it has the smallest v.
        """
        lowest = epilogue.multiplier < 0
        if epilogue.pool_min is not None:
            lowest = lowest ^ epilogue.pool_min
        pool = epilogue.pool
        return signed_pool(
            self._opset,
            v,
            lambda x: self._max_pool(x, pool.kernel_size, pool.stride, pool.padding),
            lowest,
        )
