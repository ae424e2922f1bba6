"""The first float layer of a network: fused convolution, bias, max pool, clamp and bits.

An implicit GEMM: M = output pixels of the pool, N = output channels, K = C * KH * KW in the order
of the weights. The convolution is repeated for every place of the pool's window, so that nothing is
kept between programs. For a 3x3 pool with stride 2 these are 9 times where 4 would be enough, but
the network's largest map is neither written nor read.

Operands are rounded to the compute dtype once, products are exact and sums are float32: float16 and
bfloat16 use the matrix units, float32 is multiplied as float32 (no TF32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, convolution, epilogue, launch, tiles

__all__ = ["run"]

_RUNTIME = (
    *("clamp_min", "clamp_max", "pixels", "out_height", "out_width", "out_channels"),
    *("conv_height", "conv_width", "height", "width", "stride_y", "stride_x", "pad_top"),
    *("pad_left", "pool_stride_y", "pool_stride_x", "pool_pad_y", "pool_pad_x"),
)


@triton.jit(do_not_specialize=_RUNTIME)
def stem_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    offset_ptr,
    threshold_ptr,
    sense_ptr,
    float_ptr,
    packed_ptr,
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
    stride_y,
    stride_x,
    pad_top,
    pad_left,
    pool_stride_y,
    pool_stride_x,
    pool_pad_y,
    pool_pad_x,
    x_stride_n,
    x_stride_c,
    x_stride_y,
    x_stride_x,
    CHANNELS: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    POOL_Y: tl.constexpr,
    POOL_X: tl.constexpr,
    POOLED: tl.constexpr,
    COMPUTE: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of ROWS output pixels and COLUMNS channels.

    x is [N, C, H, W] of any type with the strides given, weight float32 [O, C, KH, KW], bias
    float32 [O] or None, scale and offset float32 [C] or None, outputs as in `epilogue.finish`.
    """
    column_tiles = (out_channels + COLUMNS - 1) // COLUMNS
    channel0 = tl.program_id(0) % column_tiles * COLUMNS
    pixel0, image0, image, row, column, valid = tiles.locate(
        tl.program_id(0) // column_tiles, pixels, out_height, out_width, ROWS
    )
    channel = channel0 + tl.arange(0, COLUMNS)
    there = channel < out_channels
    x_base = x_ptr + image0 * x_stride_n
    image_offset = image.to(OFFSET) * x_stride_n
    REDUCTION: tl.constexpr = CHANNELS * KERNEL_Y * KERNEL_X

    best = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    for window in range(POOL_Y * POOL_X):
        y, x, counts = convolution.in_window(
            row, column, valid, window, conv_height, conv_width,
            pool_stride_y, pool_stride_x, pool_pad_y, pool_pad_x, POOLED, POOL_X,
        )  # fmt: skip
        top = y * stride_y - pad_top
        left = x * stride_x - pad_left
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range((REDUCTION + STEP - 1) // STEP):
            k = step * STEP + tl.arange(0, STEP)
            used = k < REDUCTION
            source = k // (KERNEL_Y * KERNEL_X)
            input_y = top[:, None] + (k // KERNEL_X % KERNEL_Y)[None, :]
            input_x = left[:, None] + (k % KERNEL_X)[None, :]
            inside = counts[:, None] & used[None, :]
            inside = inside & (input_y >= 0) & (input_y < height)
            inside = inside & (input_x >= 0) & (input_x < width)
            place = image_offset[:, None] + (source.to(OFFSET) * x_stride_c)[None, :]
            place = place + input_y.to(OFFSET) * x_stride_y + input_x.to(OFFSET) * x_stride_x
            a = tl.load(x_base + place, mask=inside, other=0).to(tl.float32)
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + source, mask=used, other=0.0)
                offset = tl.load(offset_ptr + source, mask=used, other=0.0)
                a = tl.where(inside, a * scale[None, :] + offset[None, :], 0.0)
            b = tl.load(
                weight_ptr + (channel[None, :] * REDUCTION + k[:, None]),
                mask=used[:, None] & there[None, :],
                other=0.0,
            )
            total = tl.dot(
                epilogue.operand(a, COMPUTE),
                epilogue.operand(b, COMPUTE),
                total,
                input_precision="ieee",
            )
        if not POOLED:
            best = total
        else:
            best = tl.where(counts[:, None], tl.maximum(best, total), best)

    # The bias is the same in the whole window, and rounding keeps the order: the maximum is first.
    if bias_ptr is not None:
        best = best + tl.load(bias_ptr + channel, mask=there, other=0.0)[None, :]
    epilogue.leave(
        epilogue.clamped(best, clamp_min, clamp_max), pixel0, valid, channel0, out_channels,
        float_ptr, packed_ptr, threshold_ptr, sense_ptr, ROWS, COLUMNS,
    )  # fmt: skip


_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def run(x: Tensor, stem, conv_size: tuple[int, int], outputs: convolution.Outputs) -> None:
    """Fill `outputs`, floats, bits or both, with what `stem` makes of `x`.

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or uint8, any strides.
        stem: the engine's `Stem`.
        conv_size: (rows, columns) of the convolution before the pool.
        outputs: the requested outputs.

    Raises:
        ValueError: a map has 2^31 pixels or more.
    """
    if outputs.pixels == 0:
        return
    _, channels, height, width = x.shape
    filters, _, kernel_y, kernel_x = stem.weight.shape
    tile = configs.stem_tile(
        launch.capability(x.device),
        out_channels=filters,
        pooled=not stem.pool.is_identity,
        exact=stem.compute_dtype == torch.float32,
    )
    _, _, out_height, out_width = outputs.shape
    launch.check_area(height, width, tile["ROWS"])
    launch.check_area(out_height, out_width, tile["ROWS"])
    strides = x.stride()
    reach = sum((size - 1) * step for size, step in zip(x.shape[1:], strides[1:], strict=True))
    images = launch.images_in_tile(tile["ROWS"], out_height * out_width)
    # A window in the padding starts before the image; its offsets are computed before the mask.
    before = stem.padding[0] * strides[2] + stem.padding[2] * strides[3]
    offset = launch.offset_type((images - 1) * strides[0] + reach + before + 1)
    pool = stem.pool
    blocks = triton.cdiv(outputs.pixels, tile["ROWS"]) * triton.cdiv(filters, tile["COLUMNS"])
    with torch.cuda.device_of(x):
        stem_kernel[(blocks,)](
            x,
            stem.weight.contiguous(),
            convolution.contiguous(stem.bias),
            convolution.contiguous(stem.scale),
            convolution.contiguous(stem.offset),
            convolution.contiguous(stem.threshold),
            launch.none_or_bytes(stem.sense),
            outputs.floats,
            outputs.packed,
            convolution.float_bits(stem.clamp_min),
            convolution.float_bits(stem.clamp_max),
            outputs.pixels,
            out_height,
            out_width,
            filters,
            *conv_size,
            height,
            width,
            *stem.stride,
            stem.padding[0],
            stem.padding[2],
            *pool.stride,
            *pool.padding,
            *strides,
            CHANNELS=channels,
            KERNEL_Y=kernel_y,
            KERNEL_X=kernel_x,
            POOL_Y=pool.kernel_size[0],
            POOL_X=pool.kernel_size[1],
            POOLED=not pool.is_identity,
            COMPUTE=_TYPES[stem.compute_dtype],
            OFFSET=offset,
            **tile,
            **launch.EXACT,
        )
