"""The vocabulary in plain PyTorch: the definition that every kernel is tested against.

It works on every device. The convolution runs in float32 on +-1 values and is rounded to integers.
This is exact: products are +-1 and sums stay below 2^24. The stem and the classifier have no exact
sums; they are summed in float64 (which has no TF32) and rounded once to float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from biper_engine import bits as contract
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops import matrix_reference
from biper_engine.ops.backends import Backend
from biper_engine.ops.epilogue import STEPS, SUMS, Epilogue
from biper_engine.ops.matrix import MatrixScale, MatrixShape
from biper_engine.ops.precision import without_tf32
from biper_engine.ops.rounding import fma
from biper_engine.ops.stem import Stem

__all__ = ["ReferenceBackend", "apply_epilogue", "apply_stem", "sums_of", "to_channels_last"]


def to_channels_last(x: Tensor) -> Tensor:
    """Copy a logical NCHW tensor into newly allocated channels_last memory.

    The strides are those of channels_last even if sizes of 1 make them ambiguous, so that the shape
    functions can promise them.
    """
    n, c, h, w = x.shape
    out = x.new_empty((n, h, w, c))
    out.copy_(x.permute(0, 2, 3, 1))
    return out.permute(0, 3, 1, 2)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _signs(positive: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return positive.to(dtype) * 2 - 1  # not `where` of two numbers: its dtype is torch's default


def _pool(dot: Tensor, epilogue: Epilogue) -> Tensor:
    pool = epilogue.pool
    if pool.is_identity:
        return dot
    values = dot.float()
    if epilogue.pool_min is not None:
        sign = _per_channel(_signs(~epilogue.pool_min))
        values = values * sign
    pooled = F.max_pool2d(values, pool.kernel_size, pool.stride, pool.padding)
    if epilogue.pool_min is not None:
        pooled = pooled * sign
    return pooled.to(torch.int32)


def _clamp(v: Tensor, lowest: float | None, highest: float | None) -> Tensor:
    if lowest is not None:
        v = torch.where(v < lowest, lowest, v)
    if highest is not None:
        v = torch.where(v > highest, highest, v)
    return v


def apply_stem(x: Tensor, stem: Stem) -> Tensor:
    """Return v, float32 `[N, O, OH, OW]`, of images; see `biper_engine.ops.stem` for the steps."""
    pixels = x.float()
    if stem.scale is not None and stem.offset is not None:
        pixels = fma(_per_channel(stem.scale), pixels, _per_channel(stem.offset))
    top, bottom, left, right = stem.padding
    operand = F.pad(pixels.to(stem.compute_dtype).double(), (left, right, top, bottom))
    weight = stem.weight.to(stem.compute_dtype).double()
    bias = None if stem.bias is None else stem.bias.double()
    with torch.autocast(x.device.type, enabled=False):
        v = F.conv2d(operand, weight, bias, stem.stride).float()
    pool = stem.pool
    if not pool.is_identity:
        v = F.max_pool2d(v, pool.kernel_size, pool.stride, pool.padding)
    return _clamp(v, stem.clamp_min, stem.clamp_max)


def sums_of(signs: Tensor, weight: Tensor, geometry: Conv2dGeometry) -> dict[str, Tensor]:
    """Return the sums that `epilogue.SUMS` are factors of, broadcastable to the result.

    Args:
        signs: the input, +-1, float32 [N, C, H, W].
        weight: the weights, +-1, float32 [O, C / groups, KH, KW].
        geometry: the convolution.
    """
    seen, ones = torch.ones_like(signs[:1]), torch.ones_like(weight)
    pairs = {"window": (signs, ones), "taps": (seen, weight), "valid": (seen, ones)}
    return {name: _convolved(x, w, geometry) for name, (x, w) in pairs.items()}


def _convolved(x: Tensor, weight: Tensor, geometry: Conv2dGeometry) -> Tensor:
    """Convolve float32 maps of small integers, with zeros at the padding; return integers."""
    top, bottom, left, right = geometry.padding
    padding = (top, left)
    if top != bottom or left != right:
        x = F.pad(x, (left, right, top, bottom))
        padding = (0, 0)
    exact = without_tf32() if x.device.type == "cuda" else nullcontext()
    with torch.autocast(x.device.type, enabled=False), exact:
        sums = F.conv2d(
            x, weight, None, geometry.stride, padding, geometry.dilation, geometry.groups
        )
    return sums.round()


def apply_epilogue(
    dot: Tensor,
    epilogue: Epilogue,
    residual: Tensor | None,
    sums: Mapping[str, Tensor] | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Return v, float32 `[N, O, OH, OW]`, of int32 accumulators; see `epilogue` for the steps."""
    dot = _pool(dot, epilogue)
    v = fma(_per_channel(epilogue.multiplier), dot.float(), _per_channel(epilogue.bias))
    for name in SUMS:
        factor = getattr(epilogue, name)
        if factor is not None:
            assert sums is not None
            v = fma(_per_channel(factor), sums[name], v)
    if gate is not None:
        factor = gate.float().reshape(*gate.shape[:2], 1, 1)
        offset = epilogue.offset
        v = v * factor if offset is None else fma(v, factor, _per_channel(offset))
    if residual is not None:
        v = v + residual.float()
    v = _clamp(v, epilogue.clamp_min, epilogue.clamp_max)
    negative, positive = (
        v if factor is None else v * _per_channel(factor)
        for factor in (epilogue.slope, epilogue.gain)
    )
    v = torch.where(v < 0, negative, positive)
    if epilogue.shift is not None:
        v = v + _per_channel(epilogue.shift)
    return v


class ReferenceBackend(Backend):
    """Plain PyTorch, on any device."""

    name = "reference"
    steps = frozenset(STEPS)

    def unavailable_reason(self) -> str | None:
        return None

    def unsupported_reason(
        self, op: str, geometry: Conv2dGeometry | None, device: torch.device
    ) -> str | None:
        return None

    def prepack_layout(self, geometry: Conv2dGeometry) -> tuple[tuple[int, ...], torch.dtype]:
        shape = (geometry.out_channels, geometry.group_channels, *geometry.kernel_size)
        return shape, torch.float32

    def prepack(self, weight: Tensor, geometry: Conv2dGeometry) -> Tensor:
        positive = contract.unpack_weight(weight, geometry.group_channels)
        # `contiguous()` would keep odd strides if a size is 1, unlike the shape function.
        shape, dtype = self.prepack_layout(geometry)
        return weight.new_empty(shape, dtype=dtype).copy_(_signs(positive, dtype))

    def binarize(self, x: Tensor, threshold: Tensor | None, sense: Tensor | None) -> Tensor:
        nhwc = x.permute(0, 2, 3, 1)
        return contract.pack_channels(contract.binarize(nhwc, threshold, sense))

    def unbinarize(self, bits: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        positive = contract.unpack_channels(bits, channels)
        return to_channels_last(_signs(positive, dtype).permute(0, 3, 1, 2))

    def bmaxpool2d(
        self, bits: Tensor, channels: int, pool: Pool2dGeometry, take_and: Tensor | None
    ) -> Tensor:
        values = self.unbinarize(bits, channels, torch.float32)
        if take_and is not None:
            sign = _per_channel(_signs(~take_and))
            values = values * sign
        pooled = F.max_pool2d(values, pool.kernel_size, pool.stride, pool.padding)
        if take_and is not None:
            pooled = pooled * sign
        return self.binarize(pooled, None, None)

    def bconv2d(
        self, bits: Tensor, weight: Tensor, geometry: Conv2dGeometry, prepacked: Tensor | None
    ) -> Tensor:
        signs, taps = self._operands(bits, weight, geometry, prepacked)
        return to_channels_last(_convolved(signs, taps, geometry).to(torch.int32))

    def bconv2d_fused(
        self,
        bits: Tensor,
        weight: Tensor,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        residual: Tensor | None,
        prepacked: Tensor | None,
        float_dtype: torch.dtype | None,
        want_bits: bool,
        gate: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        signs, taps = self._operands(bits, weight, geometry, prepacked)
        dot = _convolved(signs, taps, geometry).to(torch.int32)
        sums = sums_of(signs, taps, geometry) if epilogue.steps().intersection(SUMS) else None
        v = apply_epilogue(dot, epilogue, residual, sums, gate)
        stored = None if float_dtype is None else to_channels_last(v.to(float_dtype))
        packed = self.binarize(v, epilogue.threshold, epilogue.sense) if want_bits else None
        return stored, packed

    def _operands(
        self, bits: Tensor, weight: Tensor, geometry: Conv2dGeometry, prepacked: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return input and weights as +-1."""
        signs = self.unbinarize(bits, geometry.in_channels, torch.float32)
        return signs, self.prepack(weight, geometry) if prepacked is None else prepacked

    def stem(self, x: Tensor, stem: Stem) -> tuple[Tensor | None, Tensor | None]:
        v = apply_stem(x, stem)
        stored = to_channels_last(v.to(stem.compute_dtype)) if stem.want_float else None
        packed = self.binarize(v, stem.threshold, stem.sense) if stem.want_bits else None
        return stored, packed

    def pooled_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        mean = x.double().mean((2, 3)).float().double()
        total = mean @ weight.double().t()
        if bias is not None:
            total = total + bias.double()
        return total.float().to(x.dtype)

    def bmatmul(self, a: Tensor, b: Tensor, shape: MatrixShape) -> Tensor:
        sums = matrix_reference.multiply_matrices(a, b, shape)
        return to_channels_last(sums.permute(0, 3, 1, 2))

    def bmatmul_float(
        self, a: Tensor, b: Tensor, shape: MatrixShape, scale: MatrixScale, dtype: torch.dtype
    ) -> Tensor:
        sums = matrix_reference.multiply_matrices(a, b, shape)
        v = matrix_reference.scale_sums(sums, a, b, shape, scale)
        return to_channels_last(v.to(dtype).permute(0, 3, 1, 2))

    def weight_linear(
        self,
        x: Tensor,
        weight: Tensor,
        multiplier: Tensor,
        bias: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        return matrix_reference.weight_linear(x, weight, multiplier, bias, offset)
