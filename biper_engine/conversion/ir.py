"""What the passes between capture and lowering write into the graph.

Four marker functions stand for binary work; nothing ever calls them, `lower` replaces them by
`torch.ops.biper`. Their parameters are in `meta`: a `StepRule` in `meta["rule"]`, a `BinaryConv` in
`meta["conv"]`. Every node keeps in `meta["source"]` the name of the node of the simplified float
graph whose value it reproduces, which is how `verify` compares segment by segment.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry

__all__ = ["BinaryConv", "StepRule", "binarize", "binary_conv", "binary_max_pool", "unbinarize"]


def binarize(x: Tensor) -> Tensor:
    """Stand for the bits of a float map; the rule is in `meta["rule"]`."""
    raise NotImplementedError


def unbinarize(bits: Tensor) -> Tensor:
    """Stand for the map of +-1 that bits are, with `meta["channels"]` channels."""
    raise NotImplementedError


def binary_max_pool(bits: Tensor) -> Tensor:
    """Stand for a max pool of bits; the pool is in `meta["pool"]`."""
    raise NotImplementedError


def binary_conv(bits: Tensor, residual: Tensor | None = None) -> Tensor:
    """Stand for a binary convolution with its epilogue, in `meta["conv"]`."""
    raise NotImplementedError


@dataclass(frozen=True)
class StepRule:
    """A value with two levels and one step, as a function of a float source.

    Attributes:
        threshold: float32 [C]; the bit is `v >= threshold`, or `v <= threshold` where `sense`.
        sense: bool [C].
        low: value where the bit is 0.
        high: value where the bit is 1; always above `low`.
        tie: whether the function has a third value exactly at the step, as `sign` has at 0, or
            tells -0.0 from 0.0. The contract has `high` there; verification reports how often.
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
        """Return a uniform rule for another number of channels."""
        threshold, sense = self.threshold[:1].repeat(channels), self.sense[:1].repeat(channels)
        return StepRule(threshold, sense, self.low, self.high, self.tie)


@dataclass
class BinaryConv:
    """A binary convolution and what is fused into its epilogue so far, in float64.

    Attributes:
        layer: module path, for the report.
        value: the binary value that it convolves, before zero padding.
        source: the float map that `value` is a step of, element by element, or None.
        float_conv: the convolution or linear layer of the float graph that it stands for.
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
        """Whether an activation is fused, after which no scale or residual can be."""
        return self.clamp is not None or self.slope is not None or self.shift is not None

    @property
    def monotone(self) -> bool:
        """Whether the value is monotone in the accumulator, per channel, if nothing is added."""
        return self.slope is None or bool((self.slope >= 0).all())


def float64(values: Tensor | float, channels: int) -> Tensor:
    """Return a per-channel float64 vector of a scalar or of a tensor with `channels` values."""
    tensor = torch.as_tensor(values, dtype=torch.float64).reshape(-1)
    return tensor.expand(channels).clone() if tensor.numel() == 1 else tensor.clone()
