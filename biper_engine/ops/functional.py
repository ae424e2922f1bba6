"""The vocabulary as typed Python functions, with geometry and epilogue as dataclasses.

Each function is one call of the operator of the same name in `torch.ops.biper`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops.backends import use_backend
from biper_engine.ops.epilogue import OPTIONS, Epilogue
from biper_engine.ops.stem import Stem

__all__ = [
    "bconv2d",
    "bconv2d_bits",
    "bconv2d_float",
    "bconv2d_float_bits",
    "binarize",
    "bmaxpool2d",
    "pooled_linear",
    "prepack",
    "stem",
    "stem_bits",
    "unbinarize",
]


def _on(backend: str | None) -> Any:
    return nullcontext() if backend is None else use_backend(backend)


def geometry_options(geometry: Conv2dGeometry) -> dict[str, Any]:
    """Return the operator's keyword arguments for a geometry."""
    return {
        "in_channels": geometry.in_channels,
        "stride": list(geometry.stride),
        "padding": list(geometry.padding),
        "dilation": list(geometry.dilation),
        "groups": geometry.groups,
    }


def epilogue_options(epilogue: Epilogue) -> dict[str, Any]:
    """Return the operator's keyword arguments for an epilogue, apart from its operands."""
    options = {name: getattr(epilogue, name) for name in OPTIONS}
    if epilogue.pool.is_identity:
        options.pop("pool_min")
        return options
    return options | {
        "pool_kernel_size": list(epilogue.pool.kernel_size),
        "pool_stride": list(epilogue.pool.stride),
        "pool_padding": list(epilogue.pool.padding),
    }


def stem_options(parameters: Stem) -> dict[str, Any]:
    """Return the operator's arguments for a stem, by name, apart from the images."""
    pool = {}
    if not parameters.pool.is_identity:
        pool = {
            "pool_kernel_size": list(parameters.pool.kernel_size),
            "pool_stride": list(parameters.pool.stride),
            "pool_padding": list(parameters.pool.padding),
        }
    named = ("weight", "bias", "threshold", "sense", "clamp_min", "clamp_max", "scale", "offset")
    return {
        **{name: getattr(parameters, name) for name in named},
        "dtype": parameters.compute_dtype,
        "stride": list(parameters.stride),
        "padding": list(parameters.padding),
        **pool,
    }


def binarize(
    x: Tensor,
    threshold: Tensor | None = None,
    sense: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Pack the signs of a float map.

    Equivalent to packing `x >= threshold`, or `x <= threshold` if `sense`, along channels (see
    `biper_engine.bits`). -0.0 counts as 0, NaN gives 0.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16, any strides.
        threshold: [C] float32; None means 0.
        sense: [C] bool; None means False.
        backend: a name from `biper_engine.backends()`; None takes the first that can run it.

    Returns:
        [N, H, W, ceil(C / 32)] int32.

    Raises:
        GeometryError: shapes disagree.
        BackendUnavailableError: `backend` cannot run this call.
    """
    with _on(backend):
        return torch.ops.biper.binarize(x, threshold, sense)  # type: ignore[no-any-return]


def unbinarize(
    bits: Tensor,
    channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Unpack a packed map into +1 and -1.

    Args:
        bits: [N, H, W, ceil(channels / 32)] int32.
        channels: unpacked channels, C.
        dtype: float32, float16 or bfloat16.
        backend: as for `binarize`.

    Returns:
        [N, C, H, W] of `dtype`, channels_last.

    Raises:
        GeometryError: `bits` does not hold `channels`.
    """
    with _on(backend):
        return torch.ops.biper.unbinarize(bits, channels, dtype=dtype)  # type: ignore[no-any-return]


def bmaxpool2d(
    bits: Tensor,
    channels: int,
    pool: Pool2dGeometry,
    take_and: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Max pool a packed map: OR of the window's bits, or AND if `take_and`.

    Equivalent to `F.max_pool2d(x, ...)` of the +-1 map, or `-F.max_pool2d(-x, ...)` if
    `take_and`. Padding never wins.

    Args:
        bits: [N, H, W, ceil(channels / 32)] int32.
        channels: unpacked channels, C.
        pool: window, stride and padding.
        take_and: [C] bool; None means False.
        backend: as for `binarize`.

    Returns:
        [N, OH, OW, ceil(channels / 32)] int32.

    Raises:
        GeometryError: the window does not fit, or shapes disagree.
    """
    with _on(backend):
        return torch.ops.biper.bmaxpool2d(  # type: ignore[no-any-return]
            bits,
            channels,
            list(pool.kernel_size),
            stride=list(pool.stride),
            padding=list(pool.padding),
            take_and=take_and,
        )


def prepack(weight: Tensor, geometry: Conv2dGeometry, backend: str) -> Tensor:
    """Convert canonical packed weights to the layout of one backend.

    Args:
        weight: [O, KH, KW, ceil(C / groups / 32)] int32.
        geometry: the convolution that will use them.
        backend: a name from `biper_engine.backends()`.

    Returns:
        A tensor in the backend's own layout; pass it as `prepacked`.

    Raises:
        BackendUnavailableError: `backend` is unknown or cannot run here.
        GeometryError: `weight` does not fit `geometry`.
    """
    return torch.ops.biper.prepack(  # type: ignore[no-any-return]
        weight, backend=backend, **geometry_options(geometry)
    )


def bconv2d(
    bits: Tensor,
    weight: Tensor,
    geometry: Conv2dGeometry,
    *,
    prepacked: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve a packed map with packed weights into integer accumulators.

    Equivalent to `F.conv2d(unbinarize(bits), +-1 weights, stride=..., padding=...)` with zeros at
    the padding.

    Args:
        bits: [N, H, W, ceil(in_channels / 32)] int32.
        weight: [O, KH, KW, ceil(in_channels / groups / 32)] int32, canonical.
        geometry: kernel, stride, padding, dilation, groups and unpacked channels.
        prepacked: the result of `prepack` for the backend that runs, or None.
        backend: as for `binarize`.

    Returns:
        [N, O, OH, OW] int32, channels_last; every value in [-K, K].

    Raises:
        GeometryError: shapes disagree with `geometry`.
        BackendUnavailableError: `backend` cannot run this call; the message says why.
    """
    with _on(backend):
        return torch.ops.biper.bconv2d(  # type: ignore[no-any-return]
            bits, weight, prepacked=prepacked, **geometry_options(geometry)
        )


def bconv2d_float(
    bits: Tensor,
    weight: Tensor,
    geometry: Conv2dGeometry,
    epilogue: Epilogue,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    prepacked: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve packed operands and return the epilogue's float map.

    Args:
        bits: as for `bconv2d`, and so are `weight`, `geometry`, `prepacked` and `backend`.
        weight: see `bits`.
        geometry: see `bits`.
        epilogue: scale, pool, activation; see `biper_engine.ops.epilogue` for the steps.
        residual: float map of the output's shape, added after the scale, or None.
        gate: float factors [N or 1, O or 1], or the same with two more dimensions of size 1, that
            multiply before the residual is added, or None.
        dtype: float32, float16 or bfloat16 of the result; arithmetic is float32.
        prepacked: see `bits`.
        backend: see `bits`.

    Returns:
        [N, O, OH, OW] of `dtype`, channels_last.

    Raises:
        GeometryError: shapes disagree.
        BackendUnavailableError: `backend` cannot run this call.
    """
    with _on(backend):
        return torch.ops.biper.bconv2d_float(  # type: ignore[no-any-return]
            bits,
            weight,
            epilogue.multiplier,
            epilogue.bias,
            dtype=dtype,
            residual=residual,
            gate=gate,
            prepacked=prepacked,
            **epilogue_options(epilogue),
            **geometry_options(geometry),
        )


def bconv2d_bits(
    bits: Tensor,
    weight: Tensor,
    geometry: Conv2dGeometry,
    epilogue: Epilogue,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    prepacked: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve packed operands and return the epilogue's bits.

    Arguments and errors as for `bconv2d_float`; `epilogue` needs `threshold` and `sense`.

    Returns:
        [N, OH, OW, ceil(O / 32)] int32.
    """
    with _on(backend):
        return torch.ops.biper.bconv2d_bits(  # type: ignore[no-any-return]
            bits,
            weight,
            epilogue.multiplier,
            epilogue.bias,
            epilogue.threshold,
            epilogue.sense,
            residual=residual,
            gate=gate,
            prepacked=prepacked,
            **epilogue_options(epilogue),
            **geometry_options(geometry),
        )


def bconv2d_float_bits(
    bits: Tensor,
    weight: Tensor,
    geometry: Conv2dGeometry,
    epilogue: Epilogue,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    prepacked: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve packed operands and return both the epilogue's float map and its bits.

    Arguments and errors as for `bconv2d_float`; `epilogue` needs `threshold` and `sense`. The bits
    come from the float32 value, before it is rounded to `dtype`.

    Returns:
        [N, O, OH, OW] of `dtype`, channels_last, and [N, OH, OW, ceil(O / 32)] int32.
    """
    with _on(backend):
        return torch.ops.biper.bconv2d_float_bits(  # type: ignore[no-any-return]
            bits,
            weight,
            epilogue.multiplier,
            epilogue.bias,
            epilogue.threshold,
            epilogue.sense,
            dtype=dtype,
            residual=residual,
            gate=gate,
            prepacked=prepacked,
            **epilogue_options(epilogue),
            **geometry_options(geometry),
        )


def stem(x: Tensor, parameters: Stem, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Convolve, pool, clamp and pack images in one step, as plans for a GPU do.

    Equivalent to `v = F.max_pool2d(F.conv2d(x * scale + offset, weight, bias), ...).clamp(...)` and
    `binarize(v, threshold, sense)`, with zeros at the padding; see `biper_engine.ops.stem` for the
    steps and their rounding.

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or uint8, any strides.
        parameters: the weights and the following steps; `want_float` and `want_bits` are ignored,
            since the operator returns both.
        backend: as for `binarize`.

    Returns:
        [N, O, OH, OW] of `compute_dtype`, channels_last, and [N, OH, OW, ceil(O / 32)] int32; the
        bits come from the float32 values, before they are rounded to `compute_dtype`.

    Raises:
        GeometryError: shapes disagree.
        BackendUnavailableError: `backend` cannot run this call; the cpu backend never can.
    """
    with _on(backend):
        return torch.ops.biper.stem(x, **stem_options(parameters))  # type: ignore[no-any-return]


def stem_bits(x: Tensor, parameters: Stem, *, backend: str | None = None) -> Tensor:
    """Convolve, pool, clamp and pack images, and return only the bits.

    Arguments and errors as for `stem`.

    Returns:
        [N, OH, OW, ceil(O / 32)] int32.
    """
    with _on(backend):
        return torch.ops.biper.stem_bits(  # type: ignore[no-any-return]
            x, **stem_options(parameters)
        )


def pooled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Average a float map over its pixels and apply a linear layer, as plans for a GPU do.

    Equivalent to `F.linear(x.float().mean((2, 3)), weight.float(), bias.float()).to(x.dtype)`; the
    mean is rounded to float32, and the sums are float32 without TF32.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16, any strides.
        weight: [K, C] of the dtype of `x` or float32.
        bias: [K] of the dtype of `x` or float32, or None.
        backend: as for `binarize`.

    Returns:
        [N, K] of the dtype of `x`.

    Raises:
        GeometryError: shapes disagree, or the map has no pixels.
        BackendUnavailableError: `backend` cannot run this call; the cpu backend never can.
    """
    with _on(backend):
        return torch.ops.biper.pooled_linear(x, weight, bias)  # type: ignore[no-any-return]
