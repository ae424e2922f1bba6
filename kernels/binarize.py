"""Pack a float map, and unpack it.

`binarize` reads any strides: an image in NCHW memory as well as a map in channels_last.
`unbinarize` writes +1 and -1 with channels last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, epilogue, launch, tiles

__all__ = ["binarize", "unbinarize"]


@triton.jit(do_not_specialize=("pixels", "height", "width", "channels"))
def binarize_kernel(
    x_ptr,
    packed_ptr,
    threshold_ptr,
    sense_ptr,
    pixels,
    height,
    width,
    channels,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """ROWS pixels and 32 * WORDS channels: bit = sense ? x <= threshold : x >= threshold.

    x is [N, C, H, W] with the strides given, in elements; packed is int32 [N, H, W, words],
    contiguous; threshold float32 [C] or None for 0; sense uint8 [C] or None for 0.
    """
    count = (channels + 31) // 32
    blocks = (count + WORDS - 1) // WORDS
    word0 = tl.program_id(0) % blocks * WORDS
    pixel0, image0, image, row, column, valid = tiles.locate(
        tl.program_id(0) // blocks, pixels, height, width, ROWS
    )
    channel = word0 * 32 + tl.arange(0, WORDS * 32)
    there = channel < channels
    mask = valid[:, None] & there[None, :]
    place = image.to(OFFSET) * stride_n + row.to(OFFSET) * stride_y + column.to(OFFSET) * stride_x
    place = place[:, None] + (channel.to(OFFSET) * stride_c)[None, :]
    x = tl.load(x_ptr + image0 * stride_n + place, mask=mask, other=0.0).to(tl.float32)
    limit = 0.0
    if threshold_ptr is not None:
        limit = tl.load(threshold_ptr + channel, mask=there, other=0.0)[None, :]
    if sense_ptr is not None:
        sense = tl.load(sense_ptr + channel, mask=there, other=0)
        bits = epilogue.bits_of(x, limit, sense[None, :])
    else:
        bits = x >= limit
    words = tiles.pack(bits & there[None, :], ROWS, WORDS)
    word = word0 + tl.arange(0, WORDS)
    out = tl.arange(0, ROWS)[:, None] * count + word[None, :]
    tl.store(
        packed_ptr + pixel0 * count + out, words, mask=valid[:, None] & (word < count)[None, :]
    )


@triton.jit(do_not_specialize=("pixels", "channels"))
def unbinarize_kernel(
    packed_ptr,
    x_ptr,
    pixels,
    channels,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """ROWS pixels and 32 * WORDS channels of packed int32 [pixels, words] to x [pixels, C]."""
    count = (channels + 31) // 32
    blocks = (count + WORDS - 1) // WORDS
    word0 = tl.program_id(0) % blocks * WORDS
    pixel0 = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    valid = row < tl.minimum(pixels - pixel0, ROWS).to(tl.int32)
    word = word0 + tl.arange(0, WORDS)
    place = row[:, None] * count + word[None, :]
    mask = valid[:, None] & (word < count)[None, :]
    words = tl.load(packed_ptr + pixel0 * count + place, mask=mask, other=0)
    values = epilogue.rounded(
        (tiles.unpack(words, ROWS, WORDS) * 2 - 1).to(tl.float32), x_ptr.dtype.element_ty
    )
    channel = word0 * 32 + tl.arange(0, WORDS * 32)
    out = row[:, None] * channels + channel[None, :]
    tl.store(
        x_ptr + pixel0 * channels + out,
        values,
        mask=valid[:, None] & (channel < channels)[None, :],
    )


def binarize(x: Tensor, threshold: Tensor | None, sense: Tensor | None) -> Tensor:
    """Pack the signs of a float map `[N, C, H, W]` into int32 `[N, H, W, words]`.

    Raises:
        ValueError: a map has 2^31 pixels or more.
    """
    n, channels, height, width = x.shape
    count = -(-channels // 32)
    packed = x.new_empty((n, height, width, count), dtype=torch.int32)
    pixels = n * height * width
    if pixels == 0:
        return packed
    tile = configs.map_tile(count)
    launch.check_area(height, width, tile["ROWS"])
    strides = x.stride()
    reach = sum((size - 1) * step for size, step in zip(x.shape[1:], strides[1:], strict=True))
    span = (launch.images_in_tile(tile["ROWS"], height * width) - 1) * strides[0] + reach + 1
    blocks = triton.cdiv(pixels, tile["ROWS"]) * triton.cdiv(count, tile["WORDS"])
    with torch.cuda.device_of(x):
        binarize_kernel[(blocks,)](
            x,
            packed,
            None if threshold is None else threshold.contiguous(),
            launch.none_or_bytes(sense),
            pixels,
            height,
            width,
            channels,
            *strides,
            OFFSET=launch.offset_type(span),
            **tile,
            **launch.EXACT,
        )
    return packed


def unbinarize(bits: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Unpack int32 `[N, H, W, words]` into +1 and -1, `[N, C, H, W]` with channels last."""
    bits = bits.contiguous()
    n, height, width, count = bits.shape
    x = bits.new_empty((n, height, width, channels), dtype=dtype)
    pixels = n * height * width
    if pixels > 0:
        tile = configs.map_tile(count)
        blocks = triton.cdiv(pixels, tile["ROWS"]) * triton.cdiv(count, tile["WORDS"])
        with torch.cuda.device_of(bits):
            unbinarize_kernel[(blocks,)](
                bits,
                x,
                pixels,
                channels,
                **tile,
                **launch.EXACT,
            )
    return x.permute(0, 3, 1, 2)
