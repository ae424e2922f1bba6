"""Products of matrices on bits as typed Python functions; see `biper_engine.ops.matrix`."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from biper_engine.ops.functional import _on
from biper_engine.ops.matrix import MatrixScale, MatrixShape

__all__ = ["bmatmul", "bmatmul_float", "unpack_weight", "weight_linear"]


def bmatmul(a: Tensor, b: Tensor, shape: MatrixShape, *, backend: str | None = None) -> Tensor:
    """Multiply the pixels of two packed maps along their channels, row by row.

    Equivalent to `x @ y.transpose(-1, -2)` of the elements [N, H * groups, W, depth] and
    [N, H * groups, V, depth], with the last dimension of the result as channels.

    Args:
        a: [N, H, W, ceil(channels / 32)] int32.
        b: [N, H, V, ceil(channels / 32)] int32.
        shape: channels, groups, and what a bit of 0 stands for.
        backend: a name from `biper_engine.backends()`; None takes the first that can run it.

    Returns:
        [N, V, H * groups, W] int32, channels_last; row h * groups + g is group g of row h.

    Raises:
        GeometryError: shapes disagree.
        BackendUnavailableError: `backend` cannot run this call; cuda and triton never can.
    """
    with _on(backend):
        return torch.ops.biper.bmatmul(a, b, **asdict(shape))  # type: ignore[no-any-return]


def bmatmul_float(
    a: Tensor,
    b: Tensor,
    shape: MatrixShape,
    scale: MatrixScale,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Multiply two packed maps and scale the sums.

    Arguments and errors as for `bmatmul`; the steps of `scale` are in `biper_engine.ops.matrix`.

    Returns:
        [N, V, H * groups, W] of `dtype`, channels_last.
    """
    with _on(backend):
        return torch.ops.biper.bmatmul_float(  # type: ignore[no-any-return]
            a, b, **asdict(scale), dtype=dtype, **asdict(shape)
        )


def weight_linear(
    x: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Apply a linear layer with binary weights to real rows, without unpacking the weights.

    Equivalent to `F.linear(x, w, bias)` with w[o, k] = offset[o] + multiplier[o] where a bit is 1,
    offset[o] - multiplier[o] where it is 0, in float32 and the order of `biper_engine.ops.matrix`.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides.
        weight: [O, ceil(K / 32)] int32.
        multiplier: [O] float32.
        bias: [O] float32 or None.
        offset: [O] float32 or None: 0.
        backend: as for `bmatmul`.

    Returns:
        [..., O] of the dtype of `x`, contiguous.

    Raises:
        GeometryError: shapes disagree.
        BackendUnavailableError: `backend` cannot run this call; cuda and triton never can.
    """
    with _on(backend):
        return torch.ops.biper.weight_linear(  # type: ignore[no-any-return]
            x, weight, multiplier, bias, offset
        )


def unpack_weight(
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Unpack weights into two values for each output channel.

    Args:
        weight: [O, KH, KW, ceil(channels / 32)] int32, canonical.
        low: [O] float32, the value where a bit is 0.
        high: [O] float32, the value where a bit is 1.
        channels: input channels.
        dtype: float32, float16 or bfloat16.
        backend: as for `bmatmul`.

    Returns:
        [O, channels, KH, KW] of `dtype`, contiguous.

    Raises:
        GeometryError: shapes disagree.
    """
    with _on(backend):
        return torch.ops.biper.unpack_weight(  # type: ignore[no-any-return]
            weight, low, high, channels=channels, dtype=dtype
        )
