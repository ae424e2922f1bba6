"""Validate operator arguments once, at the operator's entry; shared by kernels and fakes.

Every function raises `GeometryError` or `TypeError`; the message has the given and wanted values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from biper_engine.bits import WORD_BITS, words
from biper_engine.errors import GeometryError
from biper_engine.geometry import Conv2dGeometry
from biper_engine.ops.epilogue import SUMS, VECTORS, Epilogue
from biper_engine.ops.stem import MAX_STEM_CHANNELS, Stem

__all__ = [
    "check_conv",
    "check_epilogue",
    "check_float_map",
    "check_gate",
    "check_packed_map",
    "check_per_channel",
    "check_pooled_linear",
    "check_prepacked",
    "check_residual",
    "check_stem",
    "check_stem_parameters",
]

_STREAM_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Require a dtype that a float map may have."""
    if dtype not in _STREAM_DTYPES:
        raise TypeError(f"`{name}` (={dtype}) must be float32, float16 or bfloat16.")


def check_float_map(name: str, x: Tensor) -> None:
    """Require a float map `[N, C, H, W]` with at least one channel."""
    check_dtype(f"{name}.dtype", x.dtype)
    if x.dim() != 4:
        raise GeometryError(f"`{name}` must be [N, C, H, W], but its shape is {tuple(x.shape)}.")
    if x.shape[1] < 1:
        raise GeometryError(f"`{name}` must have channels, but its shape is {tuple(x.shape)}.")


def check_packed_map(name: str, bits: Tensor, channels: int) -> None:
    """Require int32 `[N, H, W, ceil(channels / 32)]`."""
    if bits.dtype != torch.int32:
        raise TypeError(f"`{name}` must be int32 words, but its dtype is {bits.dtype}.")
    if channels < 1:
        raise GeometryError(f"`channels` (={channels}) must be at least 1.")
    if bits.dim() != 4 or bits.shape[3] != words(channels):
        raise GeometryError(
            f"`{name}` must be [N, H, W, {words(channels)}] for {channels} channels "
            f"({WORD_BITS} in a word), but its shape is {tuple(bits.shape)}."
        )


def check_per_channel(
    tensors: Mapping[str, Tensor | None], channels: int, device: torch.device
) -> None:
    """Require `[channels]` vectors on `device`: bool for senses and directions, else float32."""
    for name, value in tensors.items():
        if value is None:
            continue
        wanted = torch.bool if name == "take_and" else VECTORS.get(name, torch.float32)
        if value.dtype != wanted:
            raise TypeError(f"`{name}` must be {wanted}, but its dtype is {value.dtype}.")
        if value.dim() != 1 or value.shape[0] != channels:
            raise GeometryError(
                f"`{name}` must be [{channels}], one value per channel, but its shape is "
                f"{tuple(value.shape)}."
            )
        _check_device(name, value, device)


def check_conv(
    bits: Tensor,
    weight: Tensor,
    geometry: Conv2dGeometry,
    prepacked: Tensor | None,
) -> tuple[int, int]:
    """Require operands that fit `geometry`; return (OH, OW)."""
    check_packed_map("bits", bits, geometry.in_channels)
    if weight.dtype != torch.int32:
        raise TypeError(f"`weight` must be int32 words, but its dtype is {weight.dtype}.")
    if tuple(weight.shape) != geometry.weight_shape:
        raise GeometryError(
            f"`weight` must be {list(geometry.weight_shape)}, [O, KH, KW, words of "
            f"{geometry.group_channels} channels], but its shape is {tuple(weight.shape)}."
        )
    _check_device("weight", weight, bits.device)
    if prepacked is not None:
        _check_device("prepacked", prepacked, bits.device)
    return geometry.output_size(bits.shape[1], bits.shape[2])


def check_prepacked(
    prepacked: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    """Require the layout that `prepack` returns for the backend that runs."""
    if prepacked is not None and (tuple(prepacked.shape) != shape or prepacked.dtype != dtype):
        raise GeometryError(
            f"`prepacked` must be {dtype} {list(shape)} for the {backend} backend, which runs this "
            f"call, but it is {prepacked.dtype} {list(prepacked.shape)}; make it with "
            f"`prepack(weight, geometry, {backend!r})`."
        )


def check_epilogue(
    epilogue: Epilogue, out_channels: int, device: torch.device, *, wants_bits: bool
) -> None:
    """Require per-channel vectors of the right shape and at most one activation."""
    check_per_channel(epilogue.tensors(), out_channels, device)
    if wants_bits and (epilogue.threshold is None or epilogue.sense is None):
        raise ValueError("`threshold` and `sense` must be given to return bits, but one is None.")
    if not epilogue.pool.is_identity and epilogue.steps().intersection(SUMS):
        raise ValueError("`window`, `taps` and `valid` exclude a pool; pool the result instead.")
    if epilogue.clamped and epilogue.slope is not None:
        raise ValueError("`slope` and `clamp_min`/`clamp_max` exclude each other.")


def check_residual(residual: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Require a float map of exactly the output's shape."""
    if residual is None:
        return
    check_float_map("residual", residual)
    if tuple(residual.shape) != shape:
        raise GeometryError(
            f"`residual` must have the output's shape {shape}, but it is {tuple(residual.shape)}."
        )
    _check_device("residual", residual, device)


def check_gate(
    gate: Tensor | None, epilogue: Epilogue, shape: tuple[int, ...], device: torch.device
) -> None:
    """Require factors for the images and channels of an output of this shape, or for all."""
    if gate is None:
        if epilogue.offset is not None:
            raise ValueError("`offset` is added after a gate, but there is no `gate`.")
        return
    check_dtype("gate.dtype", gate.dtype)
    sizes = tuple(gate.shape)
    fits = len(sizes) in (2, 4) and all(size == 1 for size in sizes[2:])
    if not fits or sizes[0] not in (1, shape[0]) or sizes[1] not in (1, shape[1]):
        raise GeometryError(
            f"`gate` must be [{shape[0]} or 1, {shape[1]} or 1], images and channels, or the same "
            f"with two more dimensions of size 1, but its shape is {sizes}."
        )
    _check_device("gate", gate, device)


def check_stem_parameters(stem: Stem, device: torch.device) -> None:
    """Require consistent parameters of a stem, on `device`."""
    check_dtype("dtype", stem.compute_dtype)
    if stem.weight.dtype != torch.float32:
        raise TypeError(f"`weight` must be float32, but its dtype is {stem.weight.dtype}.")
    _check_device("weight", stem.weight, device)
    conv = stem.conv
    if conv.in_channels > MAX_STEM_CHANNELS:
        raise GeometryError(
            f"`weight` must be [O, C, KH, KW] with C at most {MAX_STEM_CHANNELS}, as images have, "
            f"but its shape is {tuple(stem.weight.shape)}; use `torch.nn.functional.conv2d`."
        )
    outgoing = {"bias": stem.bias, "threshold": stem.threshold, "sense": stem.sense}
    check_per_channel(outgoing, conv.out_channels, device)
    if (stem.scale is None) != (stem.offset is None):
        raise ValueError("`scale` and `offset` must be given together, but one of them is None.")
    check_per_channel({"scale": stem.scale, "offset": stem.offset}, conv.in_channels, device)


def check_stem(x: Tensor, stem: Stem) -> tuple[int, int, int, int]:
    """Require images that fit the parameters; return the output's [N, O, OH, OW]."""
    if x.dtype != torch.uint8 and x.dtype not in _STREAM_DTYPES:
        raise TypeError(
            f"`x.dtype` (={x.dtype}) must be float32, float16, bfloat16 or uint8, as images are."
        )
    check_stem_parameters(stem, x.device)
    out_channels, in_channels = stem.weight.shape[:2]
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise GeometryError(
            f"`x` must be [N, {in_channels}, H, W] for weights [O, C, KH, KW] of shape "
            f"{tuple(stem.weight.shape)}, but its shape is {tuple(x.shape)}."
        )
    return x.shape[0], out_channels, *stem.output_size(x.shape[2], x.shape[3])


def check_pooled_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Require a float map with pixels, and a linear layer of its channels."""
    check_float_map("x", x)
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise GeometryError(
            f"`x` must have pixels, because their mean is taken, but its shape is {tuple(x.shape)}."
        )
    shape = f"[K, {x.shape[1]}] for {x.shape[1]} channels"
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise GeometryError(f"`weight` must be {shape}, but its shape is {tuple(weight.shape)}.")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise GeometryError(
            f"`bias` must be [{weight.shape[0]}], but its shape is {tuple(bias.shape)}."
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"`{name}` must be {x.dtype}, as `x` is, or float32, but it is {value.dtype}."
            )
        _check_device(name, value, x.device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"`{name}` is on {tensor.device}, but the input is on {device}; move one with `.to()`."
        )
