"""Ties: sums of a binary layer that meet the threshold of the next sign exactly.

Without BatchNorm between two binary layers, an accumulator of 0 is common, and 0 is the threshold.
A model that adds +-s in float32 has rounding noise of either sign there; on bits it is exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biper_engine.conversion.ir import BinaryConv, StepRule
from biper_engine.ops.epilogue import SUMS

__all__ = ["tied_channels"]

_NEAR = 1e-6


def tied_channels(conv: BinaryConv, rule: StepRule) -> int:
    """Return the number of output channels with an accumulator exactly on the next threshold.

    Channels whose scale is a power of two do not count, since their float32 sums are exact, too.
    Neither do convolutions with other sums than the accumulator's.

    Args:
        conv: a convolution without residual, with its fused epilogue.
        rule: the step that follows it.
    """
    if conv.epilogue.steps().intersection(SUMS):
        return 0
    dot = conv.epilogue.accumulator_at(rule.threshold.double())
    nearest = dot.round()
    geometry = conv.geometry
    # A sum of K values of +-1 has the parity of K; padding drops taps, which may change the parity.
    any_parity = any(geometry.padding) and geometry.group_channels % 2 == 1
    parity = (nearest - geometry.reduction).remainder(2) == 0
    reached = (dot - nearest).abs() <= _NEAR * nearest.abs().clamp(min=1)
    reached &= nearest.abs() <= geometry.reduction
    reached &= parity | any_parity
    return int((reached & ~_power_of_two(conv.epilogue.multiplier)).sum())


def _power_of_two(values: Tensor) -> Tensor:
    mantissa, _ = torch.frexp(values)
    return mantissa.abs() == 0.5
