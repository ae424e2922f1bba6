"""The classifier of a network: mean over all pixels, then a linear layer, in float32.

Two kernels: every class needs every mean, so one kernel would read the map for each class block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, epilogue, launch

__all__ = ["pooled_linear"]


@triton.jit(do_not_specialize=("channels", "area", "width"))
def mean_kernel(
    x_ptr,
    mean_ptr,
    channels,
    area,
    width,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    PIXELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Mean of COLUMNS channels of one image, x [N, C, H, W] with the strides given, in float32."""
    blocks = (channels + COLUMNS - 1) // COLUMNS
    image = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    there = channel < channels
    base = x_ptr + image * stride_n + (channel.to(tl.int64) * stride_c)[None, :]
    total = tl.zeros((COLUMNS,), tl.float32)
    for step in range(STEPS):
        pixel = step * PIXELS + tl.arange(0, PIXELS)
        place = (pixel // width).to(tl.int64) * stride_y + (pixel % width).to(tl.int64) * stride_x
        mask = (pixel < area)[:, None] & there[None, :]
        x = tl.load(base + place[:, None], mask=mask, other=0.0)
        total += tl.sum(x.to(tl.float32), axis=0)
    tl.store(mean_ptr + image * channels + channel, total / area.to(tl.float32), mask=there)


@triton.jit(do_not_specialize=("images", "classes"))
def linear_kernel(
    mean_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    images,
    classes,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """ROWS images and COLUMNS classes of mean [N, C] times weight [K, C], and bias [K] or None.

    The mean is float32; weight and bias have any stream type and are widened to float32.
    """
    blocks = (classes + COLUMNS - 1) // COLUMNS
    image = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    row_there, column_there = image < images, column < classes
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range((CHANNELS + STEP - 1) // STEP):
        k = step * STEP + tl.arange(0, STEP)
        used = k < CHANNELS
        a = tl.load(
            mean_ptr + image[:, None] * CHANNELS + k[None, :],
            mask=row_there[:, None] & used[None, :],
            other=0.0,
        )
        b = tl.load(
            weight_ptr + column[None, :].to(tl.int64) * CHANNELS + k[:, None],
            mask=used[:, None] & column_there[None, :],
            other=0.0,
        )
        total = tl.dot(a, b.to(tl.float32), total, input_precision="ieee")
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column_there, other=0.0)
        total = total + bias.to(tl.float32)[None, :]
    tl.store(
        out_ptr + image[:, None] * classes + column[None, :],
        epilogue.rounded(total, out_ptr.dtype.element_ty),
        mask=row_there[:, None] & column_there[None, :],
    )


def pooled_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return mean of x `[N, C, H, W]` times weight `[K, C]` plus bias, `[N, K]` of x's type."""
    images, channels, height, width = x.shape
    classes = weight.shape[0]
    out = x.new_empty((images, classes))
    if out.numel() == 0:
        return out
    mean = x.new_empty((images, channels), dtype=torch.float32)
    capability = launch.capability(x.device)
    means, products = configs.mean_tile(capability), configs.linear_tile(capability)
    blocks = triton.cdiv(images, products["ROWS"]) * triton.cdiv(classes, products["COLUMNS"])
    with torch.cuda.device_of(x):
        mean_kernel[(images * triton.cdiv(channels, means["COLUMNS"]),)](
            x,
            mean,
            channels,
            height * width,
            width,
            *x.stride(),
            STEPS=triton.cdiv(height * width, means["PIXELS"]),
            **means,
            **launch.EXACT,
        )
        linear_kernel[(blocks,)](
            mean,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            images,
            classes,
            CHANNELS=channels,
            **products,
            **launch.EXACT,
        )
    return out
