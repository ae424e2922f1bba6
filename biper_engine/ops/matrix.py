"""Products of matrices on bits: of two packed maps, and of real rows with binary weights.

A product of two packed maps multiplies, for image n and row h, the pixels of `a` with those of `b`
along their channels. An element of an operand is 1 where its bit is 1; where its bit is 0, it is -1
or 0, which `low` says. Sums are integers. Then, each step rounded once to float32,

    base = fma(row_multiplier, rows, fma(column_multiplier, columns, bias))
    v = fma(multiplier, sum, base)

where `rows` and `columns` are the sums of the elements of a pixel of `a` and of `b`: what operands
of other pairs of values add.

A product with binary weights sums `sign * x` in float32, in this order, so that every backend gives
the same bytes: five inputs are ((s0 * x0 + s1 * x1) + s2 * x2) + (s3 * x3 + s4 * x4); a chain adds
48 of these sums to 0, in their order; the total adds the chains to 0, in their order. Missing
inputs are 0 with the sign -1. Then

    base = bias, or fma(offset, sum of x, bias) with an offset; the sum has the same order
    v = fma(multiplier, total, base)
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHAIN_INPUTS", "MATRIX_OPERATORS", "TABLE_INPUTS", "MatrixScale", "MatrixShape"]

MATRIX_OPERATORS = ("bmatmul", "bmatmul_float", "weight_linear")
"""The operators of this module, by name."""

TABLE_INPUTS = 5
"""Inputs that are added to each other before they are added to a chain."""

CHAIN_INPUTS = 48 * TABLE_INPUTS
"""Inputs of one chain of float32 additions."""


@dataclass(frozen=True)
class MatrixShape:
    """What a product of two packed maps is, apart from the sizes of the maps.

    Attributes:
        channels: unpacked channels of each map.
        groups: parts into which the channels are cut; each is a product of its own.
        low_a: element of `a` where its bit is 0; -1 or 0.
        low_b: element of `b` where its bit is 0; -1 or 0.
    """

    channels: int
    groups: int = 1
    low_a: int = -1
    low_b: int = -1

    @property
    def depth(self) -> int:
        """Number of elements that are summed."""
        return self.channels // self.groups


@dataclass(frozen=True)
class MatrixScale:
    """The steps after the sum; see the module. All numbers are rounded to float32 first."""

    multiplier: float
    row_multiplier: float = 0.0
    column_multiplier: float = 0.0
    bias: float = 0.0
