"""Binary convolution on int8 matrix units, with fused pool and epilogue.

An implicit GEMM: M = output pixels of all images, N = output channels, K = taps times channels. The
activation's bits become +1 and -1 at load, and 0 at the padding. Weights are expanded once, when
they are prepacked, and are 0 at channels that do not exist. The products are therefore those of the
trained net and need no correction. Accumulators are written to memory only if they are requested.

Within every 32 channels, K has the order in which bits are taken from a word, four at a time:
`(word >> j) & 0x01010101` holds channels j, j + 8, j + 16 and j + 24 in its bytes, so place 4j + b
is channel 8b + j, in both operands.

A binary matrix product is the case of a 1x1 kernel on a map of 1x1 pixels, with N = batch.

Layout: bits int32 [N, H, W, words], weights int8 [KH * KW, O rounded up to a tile, 32 * words] with
K last, as the matrix units need both operands, outputs with channels last. The geometry must have
one group; `bconv2d_popcount` handles the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, convolution, epilogue, launch, tiles

__all__ = ["layout", "prepack", "run"]


@triton.jit
def signs(words, inside, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Expand int32 words `[ROWS, WORDS]` to int8 +1 and -1 `[ROWS, 32 * WORDS]`; 0 outside.

    Words outside must be 0. Four lanes at a time: a byte is 0xFE * bit, inverted inside: 1 or -1.
    `join` keeps all lanes of a word in one thread, which then stores them as 32 consecutive bytes;
    broadcasting to this shape spreads a word over a warp and takes four times the instructions. The
    operand that is joined last varies fastest, so the longest shift comes first.
    """
    planes = tl.join(words, words >> 4)
    planes = tl.join(planes, planes >> 2)
    planes = tl.join(planes, planes >> 1)
    inverted = tl.where(inside, -1, 0)[:, None, None, None, None]
    planes = ((planes & 0x01010101) * 0xFE) ^ inverted
    lanes = tl.join(planes, planes >> 16)
    lanes = tl.join(lanes, lanes >> 8).to(tl.int8)
    return tl.reshape(lanes, (ROWS, WORDS * 32))


@triton.jit(do_not_specialize=(*convolution.RUNTIME, "weight_filters"))
def bconv2d_kernel(
    bits_ptr,
    weight_ptr,
    accumulator_ptr,
    float_ptr,
    packed_ptr,
    multiplier_ptr,
    bias_ptr,
    residual_ptr,
    pool_min_ptr,
    slope_ptr,
    shift_ptr,
    threshold_ptr,
    sense_ptr,
    clamp_min,
    clamp_max,
    pixels,
    out_height,
    out_width,
    out_channels,
    conv_height,
    conv_width,
    height,
    width,
    image_words,
    stride_y,
    stride_x,
    pad_top,
    pad_left,
    dilation_y,
    dilation_x,
    pool_stride_y,
    pool_stride_x,
    pool_pad_y,
    pool_pad_x,
    weight_filters,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    POOL_Y: tl.constexpr,
    POOL_X: tl.constexpr,
    POOLED: tl.constexpr,
    WORDS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP_WORDS: tl.constexpr,
):
    """One tile of ROWS output pixels and COLUMNS channels; see the module."""
    column_tiles = (out_channels + COLUMNS - 1) // COLUMNS
    channel0 = tl.program_id(0) % column_tiles * COLUMNS
    pixel0, image0, image, row, column, valid = tiles.locate(
        tl.program_id(0) // column_tiles, pixels, out_height, out_width, ROWS
    )
    bits_base = bits_ptr + image0 * image_words
    image_offset = image.to(OFFSET) * image_words

    STEPS: tl.constexpr = WORDS // STEP_WORDS
    PADDED: tl.constexpr = WORDS * 32
    k = tl.arange(0, STEP_WORDS * 32)
    filters = weight_filters.to(tl.int64)
    weight_tile = tl.arange(0, COLUMNS)[None, :] * PADDED + k[:, None]
    word = tl.arange(0, STEP_WORDS)

    best = tl.full((ROWS, COLUMNS), -(1 << 24), tl.int32)
    for window in range(POOL_Y * POOL_X):
        y, x, counts = convolution.in_window(
            row, column, valid, window, conv_height, conv_width,
            pool_stride_y, pool_stride_x, pool_pad_y, pool_pad_x, POOLED, POOL_X,
        )  # fmt: skip
        top = y * stride_y - pad_top
        left = x * stride_x - pad_left
        dot = tl.zeros((ROWS, COLUMNS), tl.int32)
        for step in range(KERNEL_Y * KERNEL_X * STEPS):
            tap = step // STEPS
            input_y = top + tap // KERNEL_X * dilation_y
            input_x = left + tap % KERNEL_X * dilation_x
            inside = counts & (input_y >= 0) & (input_y < height)
            inside = inside & (input_x >= 0) & (input_x < width)
            offset = image_offset + (input_y * width + input_x).to(OFFSET) * WORDS
            offset = offset + step % STEPS * STEP_WORDS
            words = tl.load(
                bits_base + (offset[:, None] + word[None, :]), mask=inside[:, None], other=0
            )
            a = signs(words, inside, ROWS, STEP_WORDS)
            slab = (tap * filters + channel0) * PADDED
            b = tl.load(weight_ptr + (slab + step % STEPS * STEP_WORDS * 32) + weight_tile)
            dot = tl.dot(a, b, dot, out_dtype=tl.int32)
        if not POOLED:
            best = dot
        else:
            if pool_min_ptr is not None:
                dot = convolution.turned(dot, pool_min_ptr, channel0, out_channels, COLUMNS)
            best = tl.where(counts[:, None], tl.maximum(best, dot), best)
    if POOLED and pool_min_ptr is not None:
        best = convolution.turned(best, pool_min_ptr, channel0, out_channels, COLUMNS)

    epilogue.finish(
        best, pixel0, valid, channel0, out_channels, accumulator_ptr, float_ptr, packed_ptr,
        multiplier_ptr, bias_ptr, residual_ptr, slope_ptr, shift_ptr, threshold_ptr, sense_ptr,
        clamp_min, clamp_max, ROWS, COLUMNS,
    )  # fmt: skip


def layout(conv) -> tuple[int, int, int]:
    """Return the shape of prepacked weights, int8, with filters padded to whole tiles."""
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    filters = 32 if conv.out_channels <= 32 else -(-conv.out_channels // 64) * 64
    return taps, filters, -(-conv.in_channels // 32) * 32


def prepack(positive: Tensor, conv) -> Tensor:
    """Expand weight bits, bool `[O, C, KH, KW]`, to int8 +1 and -1 in this kernel's layout."""
    taps, rows, columns = layout(conv)
    out_channels, channels = positive.shape[:2]
    lanes = positive.new_zeros((taps, rows, columns), dtype=torch.int8)
    lanes[:, :out_channels, :channels] = (
        positive.permute(2, 3, 0, 1).reshape(taps, out_channels, channels).to(torch.int8) * 2 - 1
    )
    # Channel 8b + j goes to place 4j + b.
    bytes_first = lanes.view(taps, rows, columns // 32, 4, 8).transpose(3, 4)
    return bytes_first.reshape(taps, rows, columns)


def run(
    bits: Tensor,
    weight: Tensor,
    conv,
    pool,
    conv_size: tuple[int, int],
    outputs: convolution.Outputs,
    parameters,
    residual: Tensor | None,
) -> None:
    """Fill `outputs`; see `convolution.arguments`. `weight` comes from `prepack`."""
    if outputs.pixels == 0:
        return
    words = bits.shape[3]
    tile = configs.dot_tile(
        launch.capability(bits.device),
        out_channels=conv.out_channels,
        words=words,
        pixels=outputs.pixels,
        pooled=not pool.is_identity,
    )
    tiles_m = triton.cdiv(outputs.pixels, tile["ROWS"])
    tiles_n = triton.cdiv(conv.out_channels, tile["COLUMNS"])
    with torch.cuda.device_of(bits):
        bconv2d_kernel[(tiles_m * tiles_n,)](
            weight_ptr=weight,
            **convolution.arguments(bits, conv, pool, conv_size, outputs, parameters, residual),
            weight_filters=weight.shape[1],
            WORDS=words,
            OFFSET=convolution.offsets(bits, outputs, tile["ROWS"]),
            **tile,
            **launch.EXACT,
        )
