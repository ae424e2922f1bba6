"""Binary weights: two values in every output channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BinaryWeight", "analyse_weight"]


@dataclass(frozen=True)
class BinaryWeight:
    """A weight whose output channels take two values each: `scale[o] * (+-1) + offset[o]`.

    Attributes:
        positive: bool, the weight's shape.
        scale: float64 [O], at least 0.
        offset: float64 [O]; 0 for the usual +-s.
        zeros: weights that are exactly 0 and were counted as +s.
        filled: bool [O], the output channels that have such weights.
    """

    positive: Tensor
    scale: Tensor
    offset: Tensor
    filled: Tensor
    zeros: int = 0


def analyse_weight(weight: Tensor, zero_weights: str) -> BinaryWeight | str:
    """Split a weight `[O, ...]` into bits, scale and offset.

    Two numbers count as one when they differ by what the straight-through form `(sign - c) + c`
    rounds away: at most 2^-22 * max(1, |w|), and never more than a thousandth of the channel's
    largest magnitude.

    Args:
        weight: float tensor, output channels first.
        zero_weights: "float" refuses a channel with values -s, 0, s; "positive" counts 0 as +s.

    Returns:
        The split, or the reason why the weight is not binary, as a clause after "its weight".
    """
    flat = weight.detach().double().flatten(1)
    zeros = int((flat == 0).sum())
    largest = flat.abs().amax(1, keepdim=True)
    split = _symmetric(flat, largest)
    if split is None:
        split = _asymmetric(flat, largest) if _few_values(flat) else None
    if split is None and zeros and zero_weights == "positive":
        split = _symmetric(torch.where(flat == 0, largest, flat), largest)
        return _shaped(split, weight, zeros) if split is not None else _reason(flat, zeros)
    return _reason(flat, zeros) if split is None else _shaped(split, weight, 0)


def _tolerance(largest: Tensor) -> Tensor:
    return torch.minimum(2.0**-22 * largest.clamp(min=1), 1e-3 * largest)


def _symmetric(flat: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    magnitude = flat.abs()
    if bool((magnitude.amin(1, keepdim=True) < largest - _tolerance(largest)).any()):
        return None
    if bool((flat == 0).any()):
        return None
    return flat > 0, magnitude.mean(1), torch.zeros(len(flat), dtype=torch.float64)


def _asymmetric(flat: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    positive = flat > (low + high) / 2
    nearest = torch.where(positive, high, low)
    if bool(((flat - nearest).abs() > _tolerance(largest)).any()):
        return None
    return positive, ((high - low) / 2).squeeze(1), ((high + low) / 2).squeeze(1)


def _few_values(flat: Tensor) -> bool:
    """Whether there are clearly fewer levels than weights, so that two values are no accident."""
    return flat.shape[1] > 4


def _shaped(split: tuple[Tensor, Tensor, Tensor], weight: Tensor, zeros: int) -> BinaryWeight:
    positive, scale, offset = split
    zero = (weight == 0).flatten(1).any(1)
    filled = zero if zeros else torch.zeros_like(zero)
    return BinaryWeight(positive.reshape(weight.shape), scale, offset, filled, zeros)


def _reason(flat: Tensor, zeros: int) -> str:
    distinct = len(torch.unique(flat))  # type: ignore[no-untyped-call, unused-ignore]
    largest = flat.abs().amax(1, keepdim=True)
    filled = _symmetric(torch.where(flat == 0, largest, flat), largest)
    if distinct > 2 and zeros and filled is not None:
        plural = "is" if zeros == 1 else "are"
        return (
            f"has {zeros} of {flat.numel()} values that {plural} exactly 0, which no bit can hold "
            '(`zero_weights="positive"` counts them as positive)'
        )
    return f"has {distinct} distinct values"
