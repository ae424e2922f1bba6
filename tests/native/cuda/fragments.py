"""Positions of a product's operands in the lanes of a warp, from two sources."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Places:
    """Row and column of each lane's elements, [32, elements]."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]


@dataclass(frozen=True)
class Tables:
    """Where A [16, K], B [K, 8] and C [16, 8] lie."""

    a: Places
    b: Places
    c: Places


Mode = tuple[tuple[int, ...], tuple[int, ...]]


def offsets(mode: Mode) -> NDArray[np.int64]:
    """Evaluate a CuTe mode, shape and stride: its first coordinate moves fastest."""
    shape, stride = mode
    coordinates = np.unravel_index(np.arange(np.prod(shape)), shape, order="F")
    return np.array(stride) @ np.stack(coordinates)


def cutlass_places(threads: Mode, values: Mode, rows: int) -> Places:
    """Evaluate a layout of lanes and values, whose numbers count down the columns."""
    at = offsets(threads)[:, None] + offsets(values)
    return Places(at % rows, at // rows)


# Layouts(lanes; values) as shape and stride in NVIDIA CUTLASS, include / cute / atom /
# mma_traits_sm80.hpp(BSD - 3 - Clause), at 7107b05535f8977f5ecb9d01ee203205b1fd9bc4:
# SM80_16x8x256_S32U1U1S32_TN_ANDPOPC, SM80_16x8x32_S32U8U8S32_TN, SM80_16x8x16_F32F16F16F32_TN.
# A and C count in a column of 16, B in one of 8 with N first.
LANES = (4, 8)
CUTLASS: dict[int, tuple[tuple[Mode, Mode], tuple[Mode, Mode]]] = {
    256: (
        ((LANES, (512, 1)), ((32, 2, 2), (16, 8, 2048))),
        ((LANES, (256, 1)), ((32, 2), (8, 1024))),
    ),
    32: (
        ((LANES, (64, 1)), ((4, 2, 2), (16, 8, 256))),
        ((LANES, (32, 1)), ((4, 2), (8, 128))),
    ),
    16: (
        ((LANES, (32, 1)), ((2, 2, 2), (16, 8, 128))),
        ((LANES, (16, 1)), ((2, 2), (8, 64))),
    ),
}
CUTLASS_C: tuple[Mode, Mode] = ((LANES, (32, 1)), ((2, 2), (16, 8)))


def cutlass_tables(k: int) -> Tables:
    a, b = CUTLASS[k]
    b_transposed = cutlass_places(*b, rows=8)
    return Tables(
        a=cutlass_places(*a, rows=16),
        b=Places(b_transposed.columns, b_transposed.rows),
        c=cutlass_places(*CUTLASS_C, rows=16),
    )


def ptx_tables(k: int) -> Tables:
    """Evaluate the formulas of the PTX ISA, "Matrix Fragments for mma.m16n8k256" and its like.

    They are the same for all three with P = 32, 4 and 2 elements in a register.
    """
    p = k // 8
    lane = np.arange(32)[:, None]
    group, in_group = lane >> 2, lane % 4
    i = np.arange(4 * p)
    in_first_rows = (i < p) | ((2 * p <= i) & (i < 3 * p))
    a = Places(
        np.where(in_first_rows, group, group + 8),
        in_group * p + (i & (p - 1)) + np.where(i < 2 * p, 0, 4 * p),
    )
    i = np.arange(2 * p)
    b = Places(
        in_group * p + (i & (p - 1)) + np.where(i < p, 0, 4 * p),
        group + 0 * i,
    )
    i = np.arange(4)
    c = Places(np.where(i < 2, group, group + 8), in_group * 2 + (i & 1))
    return Tables(a, b, c)


def pack(elements: NDArray[np.int64], k: int) -> NDArray[np.uint32]:
    """Put [..., elements] into words, the first into the lowest bits."""
    in_word = k // 8
    shifts = np.arange(in_word, dtype=np.uint64) * np.uint64(32 // in_word)
    groups = elements.reshape(*elements.shape[:-1], -1, in_word).astype(np.uint64)
    return (groups << shifts).sum(-1).astype(np.uint32)
