"""Binary convolution by population counts, for groups and for very few output channels.

With V the valid taps of an output pixel and C the channels of a group,
dot = |V| * C - 2 * popc((a ^ w) over V). A group may start at any bit of the activation, so each of
its words is joined from two words of the map. Matrix units would multiply zeros here: the channels
of other groups, or the columns of a tile without a filter.

Layout: bits int32 [N, H, W, words], weights int32 [KH * KW * group words, O], outputs with channels
last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, convolution, epilogue, launch, tiles

__all__ = ["layout", "prepack", "run"]


@triton.jit(
    do_not_specialize=(
        *convolution.RUNTIME,
        *("words", "group_channels", "group_filters", "last_mask"),
    )
)
def bconv2d_popcount_kernel(
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
    words,
    group_channels,
    group_filters,
    last_mask,  # a constant would change the pattern that LLVM recognises as a population count
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    POOL_Y: tl.constexpr,
    POOL_X: tl.constexpr,
    POOLED: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of ROWS output pixels and COLUMNS channels; see the module."""
    column_tiles = (out_channels + COLUMNS - 1) // COLUMNS
    channel0 = tl.program_id(0) % column_tiles * COLUMNS
    pixel0, image0, image, row, column, valid = tiles.locate(
        tl.program_id(0) // column_tiles, pixels, out_height, out_width, ROWS
    )
    bits_base = bits_ptr + image0 * image_words
    image_offset = image.to(OFFSET) * image_words
    channel = channel0 + tl.arange(0, COLUMNS)
    there = channel < out_channels
    filters = out_channels.to(tl.int64)
    first_bit = tl.where(there, channel // group_filters * group_channels, 0)
    first_word = first_bit // 32
    shift = first_bit % 32

    best = tl.full((ROWS, COLUMNS), -(1 << 24), tl.int32)
    for window in range(POOL_Y * POOL_X):
        y, x, counts = convolution.in_window(
            row, column, valid, window, conv_height, conv_width,
            pool_stride_y, pool_stride_x, pool_pad_y, pool_pad_x, POOLED, POOL_X,
        )  # fmt: skip
        top = y * stride_y - pad_top
        left = x * stride_x - pad_left
        differing = tl.zeros((ROWS, COLUMNS), tl.int32)
        valid_taps = tl.zeros((ROWS,), tl.int32)
        for tap in range(KERNEL_Y * KERNEL_X):
            input_y = top + tap // KERNEL_X * dilation_y
            input_x = left + tap % KERNEL_X * dilation_x
            inside = counts & (input_y >= 0) & (input_y < height)
            inside = inside & (input_x >= 0) & (input_x < width)
            valid_taps += inside.to(tl.int32)
            offset = image_offset + (input_y * width + input_x).to(OFFSET) * words
            slab = weight_ptr + tap * GROUP_WORDS * filters
            for index in range(GROUP_WORDS):
                word = first_word + index
                mask = inside[:, None] & there[None, :]
                place = offset[:, None] + word[None, :]
                a = tl.load(bits_base + place, mask=mask, other=0)
                if not ALIGNED:
                    second = mask & (word + 1 < words)[None, :]
                    b = tl.load(bits_base + place + 1, mask=second, other=0)
                    low = a.to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)[None, :]
                    # A shift by 32 is undefined, so one of its steps is done separately.
                    high = (b.to(tl.uint32, bitcast=True) << 1) << (31 - shift).to(tl.uint32)[
                        None, :
                    ]
                    a = (low | high).to(tl.int32, bitcast=True)
                w = tl.load(slab + index * filters + channel, mask=there, other=0)
                lanes = tl.where(index == GROUP_WORDS - 1, last_mask, -1)
                lanes = tl.where(inside, lanes, 0)
                differing += tiles.popcount((a ^ w[None, :]) & lanes[:, None])
        dot = (valid_taps * group_channels)[:, None] - 2 * differing
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


def layout(conv) -> tuple[int, int]:
    """Return the shape of prepacked weights, int32."""
    group_words = -(-conv.in_channels // conv.groups // 32)
    return conv.kernel_size[0] * conv.kernel_size[1] * group_words, conv.out_channels


def prepack(weight: Tensor, conv) -> Tensor:
    """Transpose canonical words `[O, KH, KW, words]`, so that a tile's channels are contiguous."""
    rows, columns = layout(conv)
    prepacked = weight.new_empty((rows, columns))
    prepacked.copy_(weight.reshape(columns, rows).t())
    return prepacked


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
    tile = configs.popcount_tile(launch.capability(bits.device))
    group_channels = conv.in_channels // conv.groups
    last_bits = group_channels - (group_channels - 1) // 32 * 32
    tiles_m = triton.cdiv(outputs.pixels, tile["ROWS"])
    tiles_n = triton.cdiv(conv.out_channels, tile["COLUMNS"])
    with torch.cuda.device_of(bits):
        bconv2d_popcount_kernel[(tiles_m * tiles_n,)](
            weight_ptr=weight,
            **convolution.arguments(bits, conv, pool, conv_size, outputs, parameters, residual),
            words=bits.shape[3],
            group_channels=group_channels,
            group_filters=conv.out_channels // conv.groups,
            last_mask=-1 if last_bits == 32 else (1 << last_bits) - 1,
            GROUP_WORDS=-(-group_channels // 32),
            ALIGNED=group_channels % 32 == 0 or conv.groups == 1,
            OFFSET=convolution.offsets(bits, outputs, tile["ROWS"]),
            **tile,
            **launch.EXACT,
        )
