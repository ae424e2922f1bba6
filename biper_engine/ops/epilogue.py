"""The steps after the accumulators of a binary convolution.

The epilogue is float32. Each step is rounded once and no steps are contracted, so every backend
gives the same bytes (o is the output channel):

    dot = max or min of the accumulators in the pool window, if there is a pool
    v = fma(multiplier[o], float(dot), bias[o])
    v = fma(window[o], S, v)                          if there is such a factor, and so on:
    v = fma(taps[o], T, v)
    v = fma(valid[o], V, v)
    v = fma(v, gate[n, o], offset[o])                 if there is a gate; without offset, v * gate
    v = v + residual                                  if there is a residual
    v = clamp(v, clamp_min, clamp_max)                (v < lo ? lo : v, then v > hi ? hi : v)
    v = v < 0 ? v * slope[o] : v * gain[o]            if there are such factors
    v = v + shift[o]                                  if there is a shift
    store v, rounded to the stream's dtype            if a float map is returned
    bit = sense[o] ? v <= threshold[o] : v >= threshold[o]    if bits are returned

S is the sum of the +-1 of the input that a window sees, T the sum of the weights at its valid taps,
which are those outside of the padding, and V their number times the channels of a group. The three
are integers. Inputs or weights of two values that are not -s and s need them.

The gate, like the residual, is no field of `Epilogue`: both are computed in a call. It has a number
for each image n and output channel o, or one for all images, or for all channels.

A step is a field of `Epilogue` and an entry of `VECTORS` or `NUMBERS`. Schemas, checks, files and
native arguments are made from these, so a new step needs both here, its formula in `reference.py`,
and kernels. A backend whose `steps` leave it out is not chosen for calls that have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from biper_engine.geometry import Pool2dGeometry

__all__ = ["NUMBERS", "OPTIONS", "SCHEMA", "STEPS", "SUMS", "VECTORS", "Epilogue", "steps_of"]


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """Parameters of the epilogue; see the module for the order and the rounding.

    Attributes:
        multiplier: float32 [O].
        bias: float32 [O].
        window: float32 [O], factor of the sum of a window's input, or None for 0.
        taps: float32 [O], factor of the sum of the weights at a window's valid taps, or None for 0.
        valid: float32 [O], factor of the number of inputs that a window sees, or None for 0.
        offset: float32 [O], added after the gate, or None for 0. Needs a gate.
        pool: max pool of the accumulators, before everything else. Excludes `SUMS`.
        pool_min: bool [O]; the pool takes the minimum if True. None means never.
        clamp_min: lower limit, or None.
        clamp_max: upper limit, or None.
        slope: float32 [O], factor of negative values, or None for 1. Excludes the clamp.
        gain: float32 [O], factor of the other values, or None for 1.
        shift: float32 [O], added last, or None.
        threshold: float32 [O], required if bits are returned.
        sense: bool [O], True if the bit is `v <= threshold`; required if bits are returned.
    """

    multiplier: Tensor
    bias: Tensor
    window: Tensor | None = None
    taps: Tensor | None = None
    valid: Tensor | None = None
    offset: Tensor | None = None
    pool: Pool2dGeometry = field(default_factory=Pool2dGeometry)
    pool_min: Tensor | None = None
    clamp_min: float | None = None
    clamp_max: float | None = None
    slope: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    threshold: Tensor | None = None
    sense: Tensor | None = None

    @property
    def clamped(self) -> bool:
        """Whether there is a limit."""
        return self.clamp_min is not None or self.clamp_max is not None

    @property
    def monotone(self) -> bool:
        """Whether the value, without residual and gate, is monotone in each channel's sum."""
        return all(bool((factor >= 0).all()) for factor in self._factors() if factor is not None)

    def largest_factor(self) -> Tensor:
        """Return how many times larger than before the steps after the sum make a value, [O]."""
        largest = torch.ones_like(self.multiplier)
        for factor in self._factors():
            largest = largest if factor is None else torch.maximum(largest, factor.abs())
        return largest

    def accumulator_at(self, value: Tensor) -> Tensor:
        """Return the accumulator, as a real number [O], that gives a value if there is no residual.

        It is wrong where the clamp or a factor of 0 leaves no or several such accumulators. Where
        there is an offset, it is NaN unless every gate gives the value for that accumulator.
        """
        if self.shift is not None:
            value = value - self.shift
        for factor, side in zip(self._factors(), (value < 0, value >= 0), strict=True):
            if factor is not None:
                value = torch.where(side & (factor > 0), value / factor, value)
        if self.offset is not None:
            value = torch.where(value == self.offset, 0.0, torch.nan)
        return (value - self.bias) / self.multiplier

    def _factors(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the factors of negative values and of the others."""
        return self.slope, self.gain

    def scaled(self, factor: Tensor, offset: Tensor) -> Epilogue:
        """Return the epilogue without activation whose value is `factor` times it plus `offset`.

        Where there is a gate, it must have an offset, even if that is 0.
        """
        factors = {name: getattr(self, name) for name in ("multiplier", "bias", *SUMS, "offset")}
        changed: dict[str, Any] = {n: v * factor for n, v in factors.items() if v is not None}
        last = "bias" if self.offset is None else "offset"
        return replace(self, **{**changed, last: changed[last] + offset})

    def magnitude(self, reduction: int) -> Tensor:
        """Return a bound of the value before gate and residual, [O].

        Args:
            reduction: products in a sum.
        """
        factors = [self.multiplier, *(getattr(self, name) for name in SUMS)]
        largest = sum((f.abs() for f in factors if f is not None), torch.zeros_like(self.bias))
        return largest * reduction + self.bias.abs()

    def values(self) -> dict[str, Any]:
        """Return all parameters by name."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def tensors(self) -> dict[str, Tensor]:
        """Return the per-channel tensors that are present, by name."""
        return {name: value for name, value in self.values().items() if isinstance(value, Tensor)}

    def steps(self) -> frozenset[str]:
        """Return the names of the optional parameters that are present."""
        return steps_of(self.values())

    def rounded(self) -> Epilogue:
        """Return the epilogue with its floats in float32; conversion folds them in float64."""
        floats: dict[str, Any] = {
            n: v.float() for n, v in self.tensors().items() if v.is_floating_point()
        }
        return replace(self, **floats)


VECTORS = {
    "multiplier": torch.float32,
    "bias": torch.float32,
    "window": torch.float32,
    "taps": torch.float32,
    "valid": torch.float32,
    "offset": torch.float32,
    "pool_min": torch.bool,
    "slope": torch.float32,
    "gain": torch.float32,
    "shift": torch.float32,
    "threshold": torch.float32,
    "sense": torch.bool,
}
"""The parameters that have one value per channel, and their dtypes."""

NUMBERS = ("clamp_min", "clamp_max")
"""The parameters that are one number."""

SUMS = ("window", "taps", "valid")
"""The factors of sums other than the accumulator's."""

_POSITIONAL = ("multiplier", "bias", "threshold", "sense")

OPTIONS = (*(name for name in VECTORS if name not in _POSITIONAL), *NUMBERS)
"""The optional parameters."""

STEPS = ("gate", *OPTIONS)
"""The optional steps by what they need, keyword arguments of the operators."""

SCHEMA = ", ".join(
    [
        "int[2] pool_kernel_size=1, int[2] pool_stride=1, int[2] pool_padding=0",
        *(f"{'float' if name in NUMBERS else 'Tensor'}? {name}=None" for name in STEPS),
    ]
)
"""The keyword arguments of the operators, apart from the residual."""


def steps_of(named: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the optional steps among the arguments of a call."""
    return frozenset(name for name in STEPS if named.get(name) is not None)
