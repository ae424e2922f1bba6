"""The markers that passes between capture and lowering write into the graph.

Four marker functions represent binary operators; they are never called, and `lower` replaces them
by `torch.ops.biper`. Their parameters are in `meta`: a `StepRule` in `meta["rule"]`, a `BinaryConv`
in `meta["conv"]`. `meta["source"]` of every node is the name of the node of the simplified float
graph whose value it reproduces; `verify` uses it to compare segment by segment.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry

__all__ = ["BinaryConv", "StepRule", "binarize", "binary_conv", "binary_max_pool", "unbinarize"]


def binarize(x: Tensor) -> Tensor:
    """Represent the bits of a float map; the rule is in `meta["rule"]`."""
    raise NotImplementedError


def unbinarize(bits: Tensor) -> Tensor:
    """Represent bits as a map of +-1, with `meta["channels"]` channels."""
    raise NotImplementedError


def binary_max_pool(bits: Tensor) -> Tensor:
    """Represent a max pool of bits; the pool is in `meta["pool"]`."""
    raise NotImplementedError


def binary_conv(bits: Tensor, residual: Tensor | None = None) -> Tensor:
    """Represent a binary convolution with its epilogue, in `meta["conv"]`."""
    raise NotImplementedError


@dataclass(frozen=True)
class StepRule:
    """A value with two levels and one step, as a function of a float source.

    A step of a value with more levels is one of the values of which that is the sum.

    Attributes:
        threshold: float32 [C]; the bit is `v >= threshold`, or `v <= threshold` if `sense`.
        sense: bool [C].
        low: value if the bit is 0.
        high: value if the bit is 1; above `low`, except for a step of several.
        tie: whether the function has a third value exactly at the step, like `sign` at 0, or
            distinguishes -0.0 from 0.0. The engine gives `high` there; verification counts it.
    """

    threshold: Tensor
    sense: Tensor
    low: float
    high: float
    tie: bool

    @property
    def uniform(self) -> bool:
        """Whether every channel has the same step."""
        same = (self.threshold == self.threshold[0]).all() & (self.sense == self.sense[0]).all()
        return bool(same)

    def resized(self, channels: int) -> StepRule:
        """Return a uniform rule for a different number of channels."""
        threshold, sense = self.threshold[:1].repeat(channels), self.sense[:1].repeat(channels)
        return StepRule(threshold, sense, self.low, self.high, self.tie)


@dataclass
class BinaryConv:
    """A binary convolution and the epilogue that is fused so far, in float64.

    Attributes:
        layer: module path, for the report.
        value: the binary value that is convolved, before zero padding.
        source: the float map of which `value` is an elementwise step, or None.
        float_conv: the convolution or linear layer of the float graph that it replaces.
        rule: the step of `value`.
        geometry: the convolution on bits.
        positive: weight bits, bool [O, C / groups, KH, KW].
        multiplier: float64 [O].
        bias: float64 [O].
        pool: max pool of accumulators.
        pool_min: bool [O], or None without a pool.
        clamp: (lo, hi), either may be infinite, or None.
        slope: float64 [O], or None.
        shift: float64 [O], or None.
    """

    layer: str
    value: str
    source: str | None
    float_conv: str
    rule: StepRule
    geometry: Conv2dGeometry
    positive: Tensor
    multiplier: Tensor
    bias: Tensor
    pool: Pool2dGeometry = field(default_factory=Pool2dGeometry)
    pool_min: Tensor | None = None
    clamp: tuple[float, float] | None = None
    slope: Tensor | None = None
    shift: Tensor | None = None

    @property
    def activated(self) -> bool:
        """Whether an activation is fused; no scale or residual can be fused after it."""
        return self.clamp is not None or self.slope is not None or self.shift is not None

    @property
    def monotone(self) -> bool:
        """Whether the value is monotone in the accumulator, per channel, with nothing added."""
        return self.slope is None or bool((self.slope >= 0).all())


def float64(values: Tensor | float, channels: int) -> Tensor:
    """Return a scalar or a tensor with `channels` values as a float64 vector per channel."""
    tensor = torch.as_tensor(values, dtype=torch.float64).reshape(-1)
    return tensor.expand(channels).clone() if tensor.numel() == 1 else tensor.clone()
