"""Tile sizes as launch arguments, by what a kernel computes and what the GPU supports.

They come from instruction counts and registers of compiled kernels and are not yet measured on
hardware; benchmarks will decide. For every row, no register may spill to memory, on any target that
the tests compile for.

Capabilities are those of `launch.capability`. ROWS are pixels (or images), COLUMNS output channels
(or classes).
"""

from __future__ import annotations

__all__ = [
    "MAX_POPCOUNT_FILTERS",
    "dot_tile",
    "linear_tile",
    "map_tile",
    "mean_tile",
    "popcount_tile",
    "stem_tile",
]

MAX_POPCOUNT_FILTERS = 4
"""A matrix tile is at least 32 channels wide. Below 5 channels, seven or more of its numbers would
be zeros for every useful one, and population counts are an eighth as fast as int8 products."""


def map_tile(words: int) -> dict[str, int]:
    """Return the tile for maps of `words` words: 4096 lanes, 32 for each of 128 threads."""
    width = 1 if words == 1 else 2 if words == 2 else 4
    return {"ROWS": 128 // width, "WORDS": width, "num_warps": 4}


def dot_tile(
    capability: int, *, out_channels: int, words: int, pixels: int, pooled: bool
) -> dict[str, int]:
    """Return the tile of the int8 kernel; its STEP_WORDS divides the words of a pixel.

    64 rows fill the four warps of one wgmma, and read half the weights from the L2 cache that 32
    rows do. With fewer than about two tiles for each of 132 processors, more and smaller tiles
    spread better. A pool keeps two sets of accumulators, with which 64 by 64 spills on sm_80.
    """
    step_words = next(count for count in (4, 2, 1) if words % count == 0)
    tiles = -(-pixels // 64) * -(-out_channels // 64)
    rows, columns = 32, 32
    if capability < 0:  # the interpreter takes the same time for large and small tiles
        rows, columns = 128, 64
    elif tiles >= 264 and not pooled:
        rows, columns = 64, 64 if out_channels > 32 else 32
    stages = 3 if capability >= 80 else 2  # without cp.async a stage costs registers
    tile = {"ROWS": rows, "COLUMNS": columns, "STEP_WORDS": step_words}
    return tile | {"num_warps": 4, "num_stages": stages}


def popcount_tile(capability: int) -> dict[str, int]:
    """Return the tile of the population-count kernel."""
    rows, columns = (128, 64) if capability < 0 else (32, 32)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": 4}


def stem_tile(capability: int, *, out_channels: int, pooled: bool, exact: bool) -> dict[str, int]:
    """Return the tile of the stem; its STEP is along K.

    A pool keeps two sets of sums and spills with 64 rows by 64 channels on sm_80. A STEP of 32
    spills, too, on sm_80 and sm_120 with Triton 3.6. float32 has no matrix unit: each thread
    multiplies its own block, and a smaller block leaves registers for operands.
    """
    stages = 2 if exact or capability < 80 else 3
    if capability < 0:
        tile = {"ROWS": 128, "COLUMNS": 64, "STEP": 64}
    elif exact:
        tile = {"ROWS": 32, "COLUMNS": 32, "STEP": 16}
    else:
        columns = 64 if out_channels > 32 else 32
        tile = {"ROWS": 32 if pooled else 64, "COLUMNS": columns, "STEP": 16}
    return tile | {"num_warps": 4, "num_stages": stages}


def mean_tile(capability: int) -> dict[str, int]:
    """Return the tile of the mean over pixels, one image per tile."""
    pixels, columns = (64, 128) if capability < 0 else (16, 64)
    return {"PIXELS": pixels, "COLUMNS": columns, "num_warps": 4}


def linear_tile(capability: int) -> dict[str, int]:
    """Return the tile of the classifier: small, since even 256 images by 1000 classes are few."""
    rows, columns, step = (64, 64, 64) if capability < 0 else (16, 32, 32)
    return {"ROWS": rows, "COLUMNS": columns, "STEP": step, "num_warps": 4}
