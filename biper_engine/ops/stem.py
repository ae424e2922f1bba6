"""The fused float layers of a network: its first convolution, and its classifier.

Only plans have the operators `biper::stem`, `biper::stem_bits` and `biper::pooled_linear`: the pass
that fuses them runs when a plan is made for one device. Files, reports and proofs never have
them.

A stem computes (c is an input channel, o an output channel):

    pixel = float32(x)
    pixel = fma(scale[c], pixel, offset[c])           if there is a scale; padding stays 0 after it
    v = sum of compute_dtype(pixel) * compute_dtype(weight) over the window, + bias[o], in float32
    v = max of v in the pool window                   if there is a pool; padding never wins
    v = clamp(v, clamp_min, clamp_max)                (v < lo ? lo : v, then v > hi ? hi : v)
    store v, rounded to compute_dtype                 if a float map is returned
    bit = sense[o] ? v <= threshold[o] : v >= threshold[o]    if bits are returned; None: v >= 0

Products are exact. The order of the sum is not fixed, so backends differ in its last bits, and in
a bit only if v is that close to the threshold. The reference sums in float64 and rounds once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry

__all__ = [
    "MAX_POOLED_CHANNELS",
    "MAX_STEM_CHANNELS",
    "MAX_STEM_WEIGHTS",
    "PLAN_OPERATORS",
    "Stem",
]

MAX_STEM_CHANNELS = 4
"""Largest number of image channels; a convolution of more channels is not a stem."""
MAX_STEM_WEIGHTS = 384
"""Most weights of one output channel, KH * KW * C, that plans fuse; 11x11x3 are 363.

For 32 channels they take 48 KB in float32, the shared memory that a block has on every GPU."""
MAX_POOLED_CHANNELS = 8192
"""Most channels of a `pooled_linear` that plans fuse: a block's shared memory holds the means."""

PLAN_OPERATORS = ("stem", "stem_bits", "pooled_linear")


@dataclass(frozen=True, kw_only=True)
class Stem:
    """Parameters of a fused stem; see the module for the order and the rounding.

    Attributes:
        weight: float32 [O, C, KH, KW], any strides, C at most MAX_STEM_CHANNELS.
        bias: float32 [O], or None.
        stride: (vertical, horizontal).
        padding: true zeros added at (top, bottom, left, right).
        pool: max pool of the convolution's output.
        clamp_min: lower limit, after the pool, or None.
        clamp_max: upper limit, after the pool, or None.
        scale: float32 [C], or None; both `scale` and `offset` or neither.
        offset: float32 [C], or None.
        compute_dtype: float32 (exact, no TF32), float16 or bfloat16; operands are rounded to it,
            and the float map has it.
        threshold: float32 [O]; None means 0.
        sense: bool [O], True if the bit is `v <= threshold`; None means False.
        want_float: whether to return the float map: [N, O, OH, OW], channels_last.
        want_bits: whether to return the packed map: int32 [N, OH, OW, ceil(O / 32)].
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    pool: Pool2dGeometry = field(default_factory=Pool2dGeometry)
    clamp_min: float | None = None
    clamp_max: float | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    compute_dtype: torch.dtype = torch.float32
    threshold: Tensor | None = None
    sense: Tensor | None = None
    want_float: bool = True
    want_bits: bool = True

    @property
    def conv(self) -> Conv2dGeometry:
        """Geometry of the convolution.

        Raises:
            GeometryError: a value is out of range.
        """
        return Conv2dGeometry(
            in_channels=self.weight.shape[1],
            out_channels=self.weight.shape[0],
            kernel_size=(self.weight.shape[2], self.weight.shape[3]),
            stride=self.stride,
            padding=self.padding,
        )

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (OH, OW), after the pool.

        Raises:
            GeometryError: the kernel or the pool does not fit.
        """
        size = self.conv.output_size(height, width)
        return size if self.pool.is_identity else self.pool.output_size(*size)
