"""Max pool of a packed map: OR of the window's words, or AND in channels with `take_and`.

AND is the complement of the OR of the complements, so one loop computes both. Places outside the
map add no bits, so padding never wins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, convolution, launch, tiles

__all__ = ["bmaxpool2d"]


@triton.jit(
    do_not_specialize=(
        *("pixels", "out_height", "out_width", "height", "width", "channels", "image_words"),
        *("stride_y", "stride_x", "pad_y", "pad_x"),
    )
)
def bmaxpool2d_kernel(
    bits_ptr,
    out_ptr,
    take_and_ptr,
    pixels,
    out_height,
    out_width,
    height,
    width,
    channels,
    image_words,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """ROWS output pixels and WORDS words; bits and out are int32 [N, H, W, words], contiguous.

    take_and is uint8 [C] or None.
    """
    count = (channels + 31) // 32
    blocks = (count + WORDS - 1) // WORDS
    word0 = tl.program_id(0) % blocks * WORDS
    pixel0, image0, image, row, column, valid = tiles.locate(
        tl.program_id(0) // blocks, pixels, out_height, out_width, ROWS
    )
    word = word0 + tl.arange(0, WORDS)
    channel = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    there = channel < channels
    lane = tl.arange(0, 32)[None, :]
    used = tl.sum(there.to(tl.int32) << lane, axis=1)
    flipped = tl.zeros((WORDS,), tl.int32)
    if take_and_ptr is not None:
        take_and = tl.load(take_and_ptr + channel, mask=there, other=0) != 0
        flipped = tl.sum(take_and.to(tl.int32) << lane, axis=1)

    joined = tl.zeros((ROWS, WORDS), tl.int32)
    for window in range(KERNEL_Y * KERNEL_X):
        y, x, counts = convolution.in_window(
            row, column, valid, window, height, width, stride_y, stride_x, pad_y, pad_x,
            True, KERNEL_X,
        )  # fmt: skip
        place = image.to(OFFSET) * image_words + (y * width + x).to(OFFSET) * count
        mask = counts[:, None] & (word < count)[None, :]
        words = tl.load(
            bits_ptr + image0 * image_words + (place[:, None] + word[None, :]), mask=mask, other=0
        )
        joined = joined | tl.where(mask, words ^ flipped[None, :], 0)
    out = tl.arange(0, ROWS)[:, None] * count + word[None, :]
    tl.store(
        out_ptr + pixel0 * count + out,
        (joined ^ flipped[None, :]) & used[None, :],
        mask=valid[:, None] & (word < count)[None, :],
    )


def bmaxpool2d(
    bits: Tensor,
    channels: int,
    pool,
    size: tuple[int, int],
    take_and: Tensor | None,
) -> Tensor:
    """Pool int32 `[N, H, W, words]` to `size` (rows, columns).

    Raises:
        ValueError: a map has 2^31 pixels or more.
    """
    bits = bits.contiguous()
    n, height, width, count = bits.shape
    rows, columns = size
    out = bits.new_empty((n, rows, columns, count))
    pixels = n * rows * columns
    if pixels == 0:
        return out
    tile = configs.map_tile(count)
    launch.check_area(height, width, tile["ROWS"])
    launch.check_area(rows, columns, tile["ROWS"])
    image_words = height * width * count
    span = launch.images_in_tile(tile["ROWS"], rows * columns) * image_words
    blocks = triton.cdiv(pixels, tile["ROWS"]) * triton.cdiv(count, tile["WORDS"])
    with torch.cuda.device_of(bits):
        bmaxpool2d_kernel[(blocks,)](
            bits,
            out,
            launch.none_or_bytes(take_and),
            pixels,
            rows,
            columns,
            height,
            width,
            channels,
            image_words,
            *pool.stride,
            *pool.padding,
            KERNEL_Y=pool.kernel_size[0],
            KERNEL_X=pool.kernel_size[1],
            OFFSET=launch.offset_type(span),
            **tile,
            **launch.EXACT,
        )
    return out
