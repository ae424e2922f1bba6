"""The convolution of two signs with a scale, from floats to floats, on bits where these suffice.

A bit has no room for the sign of 0, which is 0, nor for NaN. Where an operand has one, the float
convolution runs. Both have the same bytes: the geometry keeps sums of +1 and -1 below 2^24, so that
float32 holds them exactly in any order, and the scale rounds them once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from biper_engine.errors import GeometryError
from biper_engine.geometry import Conv2dGeometry
from biper_engine.ops.cpu_module import native
from biper_engine.ops.cpu_threads import thread_count
from biper_engine.ops.native_arguments import channels_last, geometry_values, native_memory
from biper_engine.ops.registration import empty_map, register

__all__ = ["SIGNED_CONVOLUTION_SCHEMAS", "bits_pay", "signed_conv2d"]

SIGNED_CONVOLUTION_SCHEMAS = {
    "signed_conv2d": (
        "(Tensor x, Tensor weight, Tensor alpha, *, int[2] stride, int[2] padding, "
        "int[2] dilation, int groups) -> Tensor"
    )
}

# With fewer channels in a group, words are mostly empty: with 8, the float convolution is faster.
_LEAST_CHANNELS = 16


def bits_pay(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> bool:
    """Return whether `signed_conv2d` takes these, keeps the layout, and is faster than floats."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() == weight.dim() == 4
        and weight.shape[1] >= _LEAST_CHANNELS
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
        and native() is not None
        and _fits(x, weight, alpha, stride, padding, dilation, groups)
    )


def _fits(x: Tensor, weight: Tensor, alpha: Tensor, *windows: Any) -> bool:
    """Return whether the operator takes these; what it refuses, floats take or name in an error."""
    if any(isinstance(window, int) or len(window) != 2 for window in windows[:3]):
        return False
    try:
        _geometry(x, weight, alpha, *windows).output_size(x.shape[2], x.shape[3])
    except GeometryError:
        return False
    return True


def signed_conv2d(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Return exactly `F.conv2d(sign(x), sign(weight), None, stride, ...) * alpha`.

    Args:
        x: [N, C, H, W] float32, any strides.
        weight: [O, C / groups, KH, KW] float32.
        alpha: [O, 1, 1] float32.
        stride: of rows and columns.
        padding: the same; a padded tap adds 0.
        dilation: the same.
        groups: as F.conv2d.

    Returns:
        [N, O, OH, OW] float32, channels_last.

    Raises:
        GeometryError: shapes disagree, the kernel does not fit, or a sum has 2^24 terms or more.
        TypeError: an operand is not float32.
    """
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    result: Tensor = torch.ops.biper.signed_conv2d(x, weight, alpha, **options)
    return result


def _geometry(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Conv2dGeometry:
    """Check the operands; return the geometry."""
    types = {"x": x.dtype, "weight": weight.dtype, "alpha": alpha.dtype}
    for name, dtype in types.items():
        if dtype != torch.float32:
            raise TypeError(f"`{name}` must be float32, but it is {dtype}.")
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] * groups != x.shape[1]:
        raise GeometryError(
            f"`x` must be [N, C, H, W] and `weight` [O, C / {groups}, KH, KW], but their shapes "
            f"are {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    if tuple(alpha.shape) != (weight.shape[0], 1, 1):
        raise GeometryError(
            f"`alpha` must be [{weight.shape[0]}, 1, 1], but its shape is {tuple(alpha.shape)}."
        )
    shape = (*weight.shape, groups, *stride, *padding, *dilation)
    # Sizes that are symbols, in traced calls, have no hash.
    made = _made_before if all(type(size) is int for size in shape) else _make
    return made(*shape)


def _make(
    outputs: int, depth: int, rows: int, columns: int, groups: int, *windows: int
) -> Conv2dGeometry:
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = windows
    return Conv2dGeometry(
        in_channels=depth * groups,
        out_channels=outputs,
        kernel_size=(rows, columns),
        stride=(stride_h, stride_w),
        padding=(pad_h, pad_h, pad_w, pad_w),
        dilation=(dilation_h, dilation_w),
        groups=groups,
    )


_made_before = lru_cache(maxsize=256)(_make)


def _signed_conv2d(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    *,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = _geometry(x, weight, alpha, stride, padding, dilation, groups)
    size = geometry.output_size(x.shape[2], x.shape[3])
    if native() is not None:
        # By name, so that copies live until the call is over.
        x, weight, alpha = channels_last(x), channels_last(weight), alpha.contiguous()
        out = empty_map(x, (x.shape[0], geometry.out_channels, *size), torch.float32)
        on_bits = native().signed_conv(
            geometry_values(geometry),
            (x.shape[0], x.shape[2], x.shape[3]),
            *map(native_memory, (x, weight, alpha, out)),
            thread_count(),
        )
        if on_bits:
            return out
    sums = F.conv2d(x.sign(), weight.sign(), None, stride, padding, dilation, groups)
    return channels_last(sums.mul_(alpha))


def _signed_conv2d_fake(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    *,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = _geometry(x, weight, alpha, stride, padding, dilation, groups)
    size = geometry.output_size(x.shape[2], x.shape[3])
    return empty_map(x, (x.shape[0], geometry.out_channels, *size), torch.float32)


for _name, _schema in SIGNED_CONVOLUTION_SCHEMAS.items():
    register(_name, _schema, _signed_conv2d, _signed_conv2d_fake, keys=("CPU",))
