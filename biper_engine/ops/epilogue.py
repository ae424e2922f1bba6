"""The steps after the accumulators of a binary convolution.

The epilogue is float32. Each step is rounded once and no steps are contracted, so every backend
gives the same bytes (o is the output channel):

    dot = max or min of the accumulators in the pool window, if there is a pool
    v = fma(multiplier[o], float(dot), bias[o])
    v = v + residual                                  if there is a residual
    v = clamp(v, clamp_min, clamp_max)                (v < lo ? lo : v, then v > hi ? hi : v)
      or v < 0 ? v * slope[o] : v                     if there is a slope
    v = v + shift[o]                                  if there is a shift
    store v, rounded to the stream's dtype            if a float map is returned
    bit = sense[o] ? v <= threshold[o] : v >= threshold[o]    if bits are returned
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from biper_engine.geometry import Pool2dGeometry

__all__ = ["Epilogue"]


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """Parameters of the epilogue; see the module for the order and the rounding.

    Attributes:
        multiplier: float32 [O].
        bias: float32 [O].
        pool: max pool of the accumulators, before everything else.
        pool_min: bool [O]; the pool takes the minimum if True. None means never.
        clamp_min: lower limit, or None.
        clamp_max: upper limit, or None.
        slope: float32 [O], factor of negative values, or None. Excludes the clamp.
        shift: float32 [O], added last, or None.
        threshold: float32 [O], required if bits are returned.
        sense: bool [O], True if the bit is `v <= threshold`; required if bits are returned.
    """

    multiplier: Tensor
    bias: Tensor
    pool: Pool2dGeometry = field(default_factory=Pool2dGeometry)
    pool_min: Tensor | None = None
    clamp_min: float | None = None
    clamp_max: float | None = None
    slope: Tensor | None = None
    shift: Tensor | None = None
    threshold: Tensor | None = None
    sense: Tensor | None = None

    def values(self) -> dict[str, Any]:
        """Return all parameters by name."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def tensors(self) -> dict[str, Tensor]:
        """Return the per-channel tensors that are present, by name."""
        return {name: value for name, value in self.values().items() if isinstance(value, Tensor)}
