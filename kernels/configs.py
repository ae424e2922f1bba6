"""Tile sizes, by what a kernel computes and what the GPU can.

Reasoned from instruction counts and registers of compiled kernels, not yet measured on hardware;
benchmarks decide later. What must hold of every row: no register spills on any target that the
tests compile for.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "MAX_POPCOUNT_FILTERS",
    "DotTile",
    "MapTile",
    "PopcountTile",
    "StemTile",
    "TailTile",
    "dot_tile",
    "map_tile",
    "popcount_tile",
    "stem_tile",
    "tail_tile",
]

MAX_POPCOUNT_FILTERS = 4
"""A matrix tile is at least 32 channels wide: below 5 it would multiply seven zeros or more for
every number that counts, and population counts are an eighth as fast as int8 products."""


@dataclass(frozen=True, kw_only=True)
class DotTile:
    """Tile of the int8 kernel.

    Attributes:
        rows: output pixels.
        columns: output channels, a multiple of 32.
        step_words: words of 32 channels in one product; divides the words of a pixel.
        warps: warps of 32 threads (64 on AMD).
        stages: loads in flight.
    """

    rows: int
    columns: int
    step_words: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class PopcountTile:
    """Tile of the population-count kernel: output pixels, output channels, warps."""

    rows: int
    columns: int
    warps: int


@dataclass(frozen=True, kw_only=True)
class MapTile:
    """Tile of a kernel that only moves a map: pixels, words of 32 channels, warps."""

    rows: int
    words: int
    warps: int


def map_tile(words: int) -> MapTile:
    """Return the tile for maps of `words` words: 4096 lanes, 32 for each of 128 threads."""
    width = 1 if words == 1 else 2 if words == 2 else 4
    return MapTile(rows=128 // width, words=width, warps=4)


def dot_tile(
    capability: int, *, out_channels: int, words: int, pixels: int, pooled: bool
) -> DotTile:
    """Return the tile of the int8 kernel.

    64 rows fill the four warps of one wgmma, and halve the weights read from the L2 cache against
    32; below about two tiles for each of 132 processors, more and smaller ones spread better. A
    pool keeps two sets of accumulators, for which 64 by 64 spills on sm_80.
    """
    step_words = next(count for count in (4, 2, 1) if words % count == 0)
    if capability < 0:  # the interpreter takes as long for a large tile as for a small one
        return DotTile(rows=128, columns=64, step_words=step_words, warps=4, stages=1)
    stages = 3 if capability >= 80 else 2  # without cp.async a stage costs registers
    columns = 64 if out_channels > 32 else 32
    tiles = -(-pixels // 64) * -(-out_channels // 64)
    rows = 64 if tiles >= 264 and not pooled else 32
    if rows == 32:
        columns = 32
    return DotTile(rows=rows, columns=columns, step_words=step_words, warps=4, stages=stages)


def popcount_tile(capability: int, *, pooled: bool) -> PopcountTile:
    """Return the tile of the population-count kernel."""
    if capability < 0:
        return PopcountTile(rows=128, columns=64, warps=4)
    return PopcountTile(rows=32, columns=32, warps=4)


@dataclass(frozen=True, kw_only=True)
class StemTile:
    """Tile of the stem: output pixels, output channels, places of K in one product, warps."""

    rows: int
    columns: int
    step: int
    warps: int


def stem_tile(capability: int, *, out_channels: int, pooled: bool, exact: bool) -> StemTile:
    """Return the tile of the stem.

    A pool keeps two sets of sums, and spills with 64 rows by 64 channels on sm_80. float32 has no
    matrix unit: each thread multiplies its own block, and a smaller one leaves room for operands.
    """
    if capability < 0:
        return StemTile(rows=128, columns=64, step=64, warps=4)
    columns = 64 if out_channels > 32 and not exact else 32
    rows = 32 if pooled or exact else 64
    return StemTile(rows=rows, columns=columns, step=16 if exact else 32, warps=4)


@dataclass(frozen=True, kw_only=True)
class TailTile:
    """Tiles of the tail: pixels and channels of a mean; images, classes, channels of a product."""

    pixels: int
    mean_columns: int
    rows: int
    columns: int
    step: int


def tail_tile(capability: int) -> TailTile:
    """Return the tiles of the tail: many small ones, as even 256 images by 1000 classes are few."""
    if capability < 0:
        return TailTile(pixels=64, mean_columns=128, rows=64, columns=64, step=64)
    return TailTile(pixels=16, mean_columns=64, rows=16, columns=32, step=32)
