"""Float32 arithmetic with one rounding, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fma"]


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a * b + c of float32 tensors, rounded once to float32.

    The product of two float32 is exact in float64, so the float64 sum is rounded once. Rounding it
    again to float32 is harmless unless it lies exactly halfway between two float32: otherwise, the
    exact sum and the float64 sum are on the same side of every halfway point. A sum at a halfway
    point is first rounded to odd (its last bit is set if the exact sum, known from the error term,
    is not a float64), which puts it on the side of the exact sum.
    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE TC 2008.
    """
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    # 29 bits of a float64 are dropped; subnormal results drop more and take the long path.
    halfway = (total.view(torch.int64) & 0x1FFFFFFF) == 0x10000000
    halfway |= (total.abs() < 2.0**-125) & (total != 0)
    if total.device.type == "cpu" and not bool(halfway.any()):
        return total.float()
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = (total.view(torch.int64) & 1) == 0
    toward = torch.where(error > 0, torch.inf, -torch.inf).to(total.dtype)
    inexact = (error != 0) & error.isfinite() & total.isfinite()
    return torch.where(inexact & even, torch.nextafter(total, toward), total).float()
