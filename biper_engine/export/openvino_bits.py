"""Packed maps as OpenVINO nodes: the rule that turns a float map into bits, in two forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Bits", "channel_values", "signed_pool", "strict_threshold"]

_LARGEST, _SMALLEST_NORMAL = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


def strict_threshold(threshold: Tensor, sense: Tensor) -> Tensor:
    """Return t such that `v > t` is the engine's bit, inverted if `sense`.

    FakeQuantize compares strictly. The bit is `v >= threshold`, which is `v > t` for the float32
    just below. If `sense`, it is `v <= threshold`, whose inverse is strict already. Next to 0, t is
    the smallest normal number, because processors may be set to treat smaller ones as 0.

    Args:
        threshold: float32 [C]; NaN, which no value reaches, becomes one end of the range.
        sense: bool [C].

    Returns:
        Finite float32 [C].
    """
    below = torch.nextafter(threshold, torch.tensor(-torch.inf))
    strict = torch.where(sense, threshold, below)
    subnormal = (strict < 0) & (strict > -_SMALLEST_NORMAL)
    strict = torch.where(subnormal, -_SMALLEST_NORMAL, strict)
    never = torch.where(sense, -_LARGEST, _LARGEST)
    return torch.where(threshold.isnan(), never, strict).clamp(-_LARGEST, _LARGEST)


@dataclass(frozen=True)
class Bits:
    """A packed map: a float map and the rule that turns it into bits.

    Attributes:
        opset: OpenVINO's first set of operations.
        source: the node of the float map.
        threshold, sense: [C], as in the engine.
    """

    opset: Any
    source: Any
    threshold: Tensor
    sense: Tensor

    @cached_property
    def node(self) -> Any:
        """FakeQuantize to 0 and 1; the bit is inverted in channels with `sense`."""
        limit = channel_values(strict_threshold(self.threshold, self.sense))
        zero, one = (np.full((1, 1, 1, 1), value, np.float32) for value in (0, 1))
        return self.opset.fake_quantize(self.source, limit, limit, zero, one, 2)

    @cached_property
    def floats(self) -> Any:
        """The map of -1 and 1, for convolutions in float.

        OpenVINO's plugin turns a FakeQuantize of two levels into bits, whatever reads it.
        """
        limit = channel_values(strict_threshold(self.threshold, self.sense))
        above = channel_values(torch.where(self.sense, -1.0, 1.0))
        return self.opset.select(self.opset.greater(self.source, limit), above, -above)

    def pooled(self, pool: Callable[[Any], Any], take_and: Tensor | None) -> Bits:
        """Return the bits of the pooled map: a step is monotonic, so the pool may come first."""
        lowest = self.sense if take_and is None else self.sense != take_and
        pooled = signed_pool(self.opset, self.source, pool, lowest)
        return Bits(self.opset, pooled, self.threshold, self.sense)


def channel_values(values: Tensor) -> Any:
    """Return a number for each channel as [1, C, 1, 1]."""
    return np.array(values.detach().float().numpy()).reshape(1, -1, 1, 1)


def signed_pool(opset: Any, source: Any, pool: Callable[[Any], Any], lowest: Tensor) -> Any:
    """Pool a map: channels with `lowest` by the minimum, the others by the maximum."""
    if not bool(lowest.any()):
        return pool(source)
    sign = channel_values(torch.where(lowest, -1.0, 1.0))
    return opset.multiply(pool(opset.multiply(source, sign)), sign)
