"""Binary weights: two or three values in every output channel, as one or two terms of +-1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["BinaryWeight", "WeightTerm", "analyse_weight"]


@dataclass(frozen=True)
class WeightTerm:
    """A part `scale[o] * (+-1)` of a weight.

    Attributes:
        positive: bool, the weight's shape.
        scale: float64 [O].
    """

    positive: Tensor
    scale: Tensor

    @property
    def same(self) -> Tensor | None:
        """The value of a channel's weights, [O], if all weights have one sign, else None."""
        if bool(self.positive.all()):
            return self.scale
        return None if bool(self.positive.any()) else -self.scale

    def weight(self) -> Tensor:
        """Return the part in float64."""
        signs = torch.where(self.positive, 1.0, -1.0).double()
        return signs * self.scale.view([-1] + [1] * (signs.dim() - 1))


@dataclass(frozen=True)
class BinaryWeight:
    """A weight whose output channels take two values each, or three of which one is 0.

    Values -s and s are one term. Values -s, 0 and s are the mean of two: the weight with 0 replaced
    by s, and by -s. Values u and v are (v - u) / 2 times a sign and (u + v) / 2 times 1.

    Attributes:
        positive: bool, the weight's shape; True if the first term is positive.
        scale: float64 [O], scale of the first term, at least 0.
        second: the second term, or None if no channel has one; its scale is 0 for channels without
            one.
        zeros: number of weights that are exactly 0 in channels of three values.
    """

    positive: Tensor
    scale: Tensor
    second: WeightTerm | None = None
    zeros: int = 0

    @property
    def terms(self) -> int:
        """Number of binary convolutions; a term with one sign needs none beside another."""
        return max(1, sum(term.same is None for term in self.all_terms()))

    def all_terms(self) -> list[WeightTerm]:
        """Return the terms, the first one first."""
        first = WeightTerm(self.positive, self.scale)
        return [first] if self.second is None else [first, self.second]

    def weight(self) -> Tensor:
        """Return the weight in float64."""
        return sum((term.weight() for term in self.all_terms()[1:]), self.all_terms()[0].weight())

    def part(self, rows: Sequence[int], columns: Sequence[int]) -> BinaryWeight:
        """Return the weight of some taps of [O, C, KH, KW], in their order."""
        taps = (slice(None), slice(None), torch.tensor(rows)[:, None], torch.tensor(columns))
        second = self.second
        if second is not None:
            second = replace(second, positive=second.positive[taps])
        return replace(self, positive=self.positive[taps], second=second)

    def reshaped(self, shape: Sequence[int]) -> BinaryWeight:
        """Return the same weight in another shape, output channels first."""
        second = self.second
        if second is not None:
            second = replace(second, positive=second.positive.reshape(*shape))
        return replace(self, positive=self.positive.reshape(*shape), second=second)


def analyse_weight(weight: Tensor) -> BinaryWeight | str:
    """Split a weight `[O, ...]` into terms, each channel separately.

    Two numbers count as equal if they differ by the rounding of the straight-through form
    `(sign - c) + c`: at most 2^-22 * max(1, |w|), and never more than a thousandth of the channel's
    largest magnitude. Only an exact 0 counts as 0.

    Args:
        weight: float tensor, output channels first.

    Returns:
        The split, or the reason why the weight is not binary, as a clause after "its weight".
    """
    flat = weight.detach().double().flatten(1)
    if not flat.numel():
        return "is empty"
    if not bool(flat.isfinite().all()):
        return "has values that are infinite or NaN"
    magnitude = flat.abs()
    counts = magnitude.count_nonzero(1)
    if _is_accident(counts, flat.shape[1]):
        return _refusal(flat)
    largest = magnitude.amax(1, keepdim=True)
    tolerance = torch.minimum(2.0**-22 * largest.clamp(min=1), 1e-3 * largest)
    ternary = (counts > 0) & (counts < flat.shape[1])
    nonzero = magnitude.masked_fill(flat == 0, torch.inf) if bool(ternary.any()) else magnitude
    # A channel of zeros is also symmetric.
    symmetric = (nonzero.amin(1, keepdim=True) >= largest - tolerance).squeeze(1)
    ternary = symmetric & ternary
    scale = magnitude.sum(1) / counts.clamp(min=1)
    positive = flat >= 0
    if bool(symmetric.all()) and not bool(ternary.any()):
        return BinaryWeight(positive.reshape(weight.shape), scale)
    # The second term: 0 counted as -s, or the offset of two values, which is the same everywhere.
    scale = torch.where(ternary, scale / 2, scale)
    other, offset = (flat > 0) | ~ternary[:, None], torch.where(ternary, scale, 0.0)
    if not bool(symmetric.all()):
        pairs = _pairs(flat, tolerance, symmetric)
        if pairs is None:
            return _refusal(flat)
        upper, half, middle = pairs
        positive = torch.where(symmetric[:, None], positive, upper)
        scale, offset = torch.where(symmetric, scale, half), torch.where(symmetric, offset, middle)
    second = WeightTerm(other.reshape(weight.shape), offset)
    zeros = int((flat.shape[1] - counts)[ternary].sum())
    return BinaryWeight(positive.reshape(weight.shape), scale, second, zeros)


def _pairs(flat: Tensor, tolerance: Tensor, done: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Split channels of two values; None if a channel that is not `done` has more than two.

    With at most four weights per channel, two values may be a coincidence: these are not split.
    """
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    upper = flat > (low + high) / 2
    off = (flat - torch.where(upper, high, low)).abs()
    if flat.shape[1] <= 4 or bool((off > tolerance)[~done].any()):
        return None
    return upper, ((high - low) / 2).squeeze(1), ((high + low) / 2).squeeze(1)


def _refusal(flat: Tensor) -> str:
    return f"has {len(torch.unique(flat))} distinct values"


def _is_accident(counts: Tensor, size: int) -> bool:
    """Whether no channel has two nonzero weights, so that their equality means nothing."""
    some = bool((counts < size).any()) and bool((counts > 0).any())
    return some and int(counts.max()) < 2
