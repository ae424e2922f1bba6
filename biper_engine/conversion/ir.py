"""The markers that passes between capture and lowering write into the graph.

Four marker functions represent binary operators; they are never called, and `lower` replaces them
by `torch.ops.biper`. Their parameters are in `meta`: a `StepRule` in `meta["rule"]`, a `BinaryConv`
in `meta["conv"]`. `meta["source"]` of every node is the name of the node of the simplified float
graph whose value it reproduces; `verify` uses it to compare segment by segment.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from biper_engine.geometry import Conv2dGeometry
from biper_engine.ops.epilogue import SUMS, Epilogue

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


def binary_conv(
    bits: Tensor, residual: Tensor | None = None, *, gate: Tensor | None = None
) -> Tensor:
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
    """A binary convolution and the epilogue that is fused so far.

    Attributes:
        layer: module path, for the report.
        value: the binary value that is convolved, before zero padding.
        source: the float map of which `value` is an elementwise step, or None.
        float_conv: the convolution or linear layer of the float graph that it replaces.
        rule: the step of `value`.
        geometry: the convolution on bits.
        positive: weight bits, bool [O, C / groups, KH, KW].
        epilogue: its parameters; floats are float64 until `lower` rounds them. It has an offset,
            even if that is 0, if there is a gate.
        rows: whether `value` has its channels in the last dimension, and no height and width.
    """

    layer: str
    value: str
    source: str | None
    float_conv: str
    rule: StepRule
    geometry: Conv2dGeometry
    positive: Tensor
    epilogue: Epilogue
    rows: bool = False

    def fused(self, **parameters: Any) -> BinaryConv:
        """Return the convolution with some parameters of its epilogue replaced."""
        return replace(self, epilogue=replace(self.epilogue, **parameters))

    @property
    def activated(self) -> bool:
        """Whether an activation is fused; no scale or residual can be fused after it."""
        return bool(self.epilogue.steps().difference({"pool_min", "offset"}, SUMS))

    @property
    def gated(self) -> bool:
        """Whether a gate is fused."""
        return self.epilogue.offset is not None


def float64(values: Tensor | float, channels: int) -> Tensor:
    """Return a scalar or a tensor with `channels` values as a float64 vector per channel."""
    tensor = torch.as_tensor(values, dtype=torch.float64).reshape(-1)
    return tensor.expand(channels).clone() if tensor.numel() == 1 else tensor.clone()
