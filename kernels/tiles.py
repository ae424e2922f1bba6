"""Parts of every kernel: the pixels of a tile, and packing lanes into words and back.

A map `[N, H, W, ...]` is a list of N * H * W pixels, and a tile is a run of `ROWS` of them, which
may span images. Bits follow the contract: channel c is bit c % 32 of word c // 32.
"""

import triton
import triton.language as tl


@triton.jit
def locate(tile, pixels, height, width, ROWS: tl.constexpr):
    """Return the positions of the pixels of a tile.

    height * width must be below 2^31 - ROWS; the number of pixels may be larger.

    Returns:
        first: int64 scalar, the first pixel's place in the list.
        image0: int64 scalar, the first pixel's image.
        image: int32 [ROWS], images after the first one.
        row, column: int32 [ROWS].
        valid: [ROWS], False beyond the last pixel.
    """
    first = tile.to(tl.int64) * ROWS
    area = height * width
    image0 = first // area
    place = (first - image0 * area).to(tl.int32) + tl.arange(0, ROWS)
    image = place // area
    place = place - image * area
    row = place // width
    valid = tl.arange(0, ROWS) < tl.minimum(pixels - first, ROWS).to(tl.int32)
    return first, image0, image, row, place - row * width, valid


@triton.jit
def pack(bits, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Pack a tile of bits `[ROWS, 32 * WORDS]` into int32 `[ROWS, WORDS]`.

    The lanes are disjoint, so the sum is a bitwise or; bit 31 wraps to the sign, as intended.
    """
    lanes = tl.reshape(bits.to(tl.int32), (ROWS, WORDS, 32))
    return tl.sum(lanes << tl.arange(0, 32)[None, None, :], axis=2)


@triton.jit
def unpack(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Return the bits 0 and 1 of int32 words `[ROWS, WORDS]` as int32 `[ROWS, 32 * WORDS]`."""
    lanes = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(lanes, (ROWS, 32 * WORDS))


@triton.jit
def popcount(words):
    """Return the set bits of int32 words.

    LLVM recognises this pattern and compiles it to one instruction (POPC, v_bcnt). Triton has no
    function that does the same and also works in the interpreter.
    """
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)
