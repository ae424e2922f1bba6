"""Shared parts of both binary convolution kernels: arguments, outputs, pixels of a window."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

__all__ = ["RUNTIME", "Outputs", "arguments", "contiguous", "float_bits", "offsets"]

RUNTIME = (
    *("clamp_min", "clamp_max", "pixels", "out_height", "out_width", "out_channels"),
    *("conv_height", "conv_width", "height", "width", "image_words"),
    *("stride_y", "stride_x", "pad_top", "pad_left", "dilation_y", "dilation_x"),
    *("pool_stride_y", "pool_stride_x", "pool_pad_y", "pool_pad_x"),
)
"""Arguments whose values compile no new kernel: one kernel runs every image size and stride."""


class Outputs:
    """The output tensors of a convolution of `shape` [N, O, OH, OW]; None if not requested.

    Attributes:
        accumulators: int32 [N, OH, OW, O].
        floats: [N, OH, OW, O] of a stream type.
        packed: int32 [N, OH, OW, ceil(O / 32)].
    """

    def __init__(
        self,
        bits: Tensor,
        shape: tuple[int, int, int, int],
        *,
        accumulators: bool = False,
        float_dtype: torch.dtype | None = None,
        packed: bool = False,
    ) -> None:
        n, channels, rows, columns = shape
        self.shape = shape

        def empty(last: int, dtype: torch.dtype) -> Tensor:
            return bits.new_empty((n, rows, columns, last), dtype=dtype)

        self.accumulators = empty(channels, torch.int32) if accumulators else None
        self.floats = empty(channels, float_dtype) if float_dtype is not None else None
        self.packed = empty(-(-channels // 32), torch.int32) if packed else None

    @property
    def pixels(self) -> int:
        """Output pixels of the whole batch."""
        return self.shape[0] * self.shape[2] * self.shape[3]


def float_bits(value: float | None) -> int | None:
    """Return the bits of a float, rounded to float32, as a signed integer."""
    if value is None:
        return None
    return torch.tensor(value, dtype=torch.float32, device="cpu").view(torch.int32).item()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor, or a dense copy if it is not dense."""
    return None if tensor is None else tensor.contiguous()


def _nhwc(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.permute(0, 2, 3, 1).contiguous()


def arguments(
    bits: Tensor,
    conv,
    pool,
    conv_size: tuple[int, int],
    outputs: Outputs,
    epilogue,
    residual: Tensor | None,
) -> dict[str, object]:
    """Return the keyword arguments of both kernels, except for block sizes.

    Args:
        bits: packed map, contiguous.
        conv: geometry of the convolution.
        pool: max pool of the accumulators; the identity does nothing.
        conv_size: (rows, columns) of accumulators before the pool.
        outputs: the requested outputs.
        epilogue: the engine's `Epilogue`; for accumulators, only its `pool_min`, or None.
        residual: [N, O, OH, OW], any strides, or None.
    """
    _, height, width, words = bits.shape
    vectors = ("multiplier", "bias", "slope", "shift", "threshold")
    parts = {f"{name}_ptr": contiguous(getattr(epilogue, name, None)) for name in vectors}
    flags = ("sense", "pool_min")
    parts |= {f"{name}_ptr": launch.none_or_bytes(getattr(epilogue, name, None)) for name in flags}
    pooled = not pool.is_identity
    return parts | {
        "bits_ptr": bits,
        "accumulator_ptr": outputs.accumulators,
        "float_ptr": outputs.floats,
        "packed_ptr": outputs.packed,
        "residual_ptr": _nhwc(residual),
        "pool_min_ptr": parts["pool_min_ptr"] if pooled else None,
        "clamp_min": float_bits(getattr(epilogue, "clamp_min", None)),
        "clamp_max": float_bits(getattr(epilogue, "clamp_max", None)),
        "pixels": outputs.pixels,
        "out_height": outputs.shape[2],
        "out_width": outputs.shape[3],
        "out_channels": conv.out_channels,
        "conv_height": conv_size[0],
        "conv_width": conv_size[1],
        "height": height,
        "width": width,
        "image_words": height * width * words,
        "stride_y": conv.stride[0],
        "stride_x": conv.stride[1],
        "pad_top": conv.padding[0],
        "pad_left": conv.padding[2],
        "dilation_y": conv.dilation[0],
        "dilation_x": conv.dilation[1],
        "pool_stride_y": pool.stride[0],
        "pool_stride_x": pool.stride[1],
        "pool_pad_y": pool.padding[0],
        "pool_pad_x": pool.padding[1],
        "KERNEL_Y": conv.kernel_size[0],
        "KERNEL_X": conv.kernel_size[1],
        "POOL_Y": pool.kernel_size[0],
        "POOL_X": pool.kernel_size[1],
        "POOLED": pooled,
    }


def offsets(bits: Tensor, outputs: Outputs, rows: int) -> tl.dtype:
    """Return the type of a tile's offsets into the packed map.

    Raises:
        ValueError: a map has 2^31 pixels or more.
    """
    _, height, width, words = bits.shape
    _, _, out_height, out_width = outputs.shape
    launch.check_area(height, width, rows)
    launch.check_area(out_height, out_width, rows)
    span = launch.images_in_tile(rows, out_height * out_width) * height * width * words
    return launch.offset_type(span)


@triton.jit
def in_window(
    row,
    column,
    valid,
    window,
    conv_height,
    conv_width,
    pool_stride_y,
    pool_stride_x,
    pool_pad_y,
    pool_pad_x,
    POOLED: tl.constexpr,
    POOL_X: tl.constexpr,
):
    """Return row, column and validity of the accumulators at place `window` of a pool's window."""
    if not POOLED:
        return row, column, valid
    else:
        y = row * pool_stride_y - pool_pad_y + window // POOL_X
        x = column * pool_stride_x - pool_pad_x + window % POOL_X
        return y, x, valid & (y >= 0) & (y < conv_height) & (x >= 0) & (x < conv_width)


@triton.jit
def turned(dot, pool_min_ptr, channel0, out_channels, COLUMNS: tl.constexpr):
    """Negate the channels whose pool takes the minimum: min(x) = -max(-x)."""
    channel = channel0 + tl.arange(0, COLUMNS)
    smallest = tl.load(pool_min_ptr + channel, mask=channel < out_channels, other=0)
    return tl.where((smallest != 0)[None, :], -dot, dot)
