"""The operators of binary networks, `torch.ops.biper`.

A packed map knows its number of channels, so that no operator takes its unused bits for values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import biper_engine.ops.registration  # noqa: F401  (registers the operators)
from biper_engine.bits import WORD_BITS, words
from biper_engine.errors import GeometryError
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.graph import rows
from biper_engine.graph.arguments import COUNT, DTYPE, TENSOR, Kind, integers, number, optional
from biper_engine.graph.operator import Operator, Result, Rule
from biper_engine.graph.patterns import pair
from biper_engine.graph.sizes import MisfitError, Size
from biper_engine.graph.values import Value, require, require_dtype
from biper_engine.ops.epilogue import NUMBERS, STEPS, SUMS, VECTORS

__all__ = [
    "OPERATORS",
    "STREAM",
    "STREAMS",
    "require_clear_bits",
    "require_packed",
    "require_vectors",
]

_biper = torch.ops.biper

STREAMS = (torch.float32, torch.float16, torch.bfloat16)
_FLOWING = ("x", "bits", "residual", "gate")


def _map_sizes(name: str, x: Value) -> tuple[Size, int, int, int]:
    """Return the sizes of a float map [N, C, H, W], or of a packed map in its own order."""
    if x.rank == 4:
        batch, *sizes = x.shape
        if all(isinstance(size, int) and size >= 1 for size in sizes):
            return batch, *sizes  # type: ignore[return-value]
    raise MisfitError(f"`{name}` must be a map of 4 dimensions, but it is {x}")


def require_packed(name: str, bits: Value, channels: int) -> tuple[Size, int, int]:
    """Require a packed map of `channels` channels; return batch, height and width."""
    fits = bits.channels == channels and bits.dtype == torch.int32
    if not fits:
        raise MisfitError(f"`{name}` must be a packed map of {channels} channels, but it is {bits}")
    batch, height, width, _ = _map_sizes(name, bits)
    return batch, height, width


def _packed(batch: Size, channels: int, height: int, width: int) -> Value:
    return Value(torch.int32, (batch, height, width, words(channels)), channels)


def require_vectors(channels: int, **vectors: Value | None) -> None:
    """Require vectors with a finite number, or a flag, for each channel."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        wanted = torch.bool if name == "take_and" else VECTORS.get(name, torch.float32)
        fits = vector.dtype == wanted and vector.shape == (channels,) and vector.channels is None
        if not fits:
            raise MisfitError(f"`{name}` must be {wanted} [{channels}], but it is {vector}")
        if vector.constant is None or wanted == torch.bool:
            continue
        known = vector.constant
        clear = not known.isnan().any() if name == "threshold" else known.isfinite().all()
        require(bool(clear), f"`{name}` has values that are not finite")


# -- maps ------------------------------------------------------------------------------------------


def _binarize(x: Value, threshold: Value | None, sense: Value | None) -> Value:
    require_dtype("x", x, STREAMS)
    batch, channels, height, width = _map_sizes("x", x)
    require_vectors(channels, threshold=threshold, sense=sense)
    return _packed(batch, channels, height, width)


def _unbinarize(bits: Value, channels: int, dtype: torch.dtype) -> Value:
    batch, height, width = require_packed("bits", bits, channels)
    return Value(dtype, (batch, channels, height, width))


def _max_pool(
    bits: Value,
    channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    take_and: Value | None,
) -> Value:
    batch, height, width = require_packed("bits", bits, channels)
    require_vectors(channels, take_and=take_and)
    pool = Pool2dGeometry(kernel_size=pair(kernel_size), stride=pair(stride), padding=pair(padding))
    return _packed(batch, channels, *pool.output_size(height, width))


# -- convolutions ----------------------------------------------------------------------------------


def _conv_sizes(
    bits: Value, weight: Value, geometry: Mapping[str, Any]
) -> tuple[Size, int, int, int]:
    """Return batch, channels, height and width of the accumulators."""
    in_channels = geometry["in_channels"]
    batch, height, width = require_packed("bits", bits, in_channels)
    fits = weight.dtype == torch.int32 and weight.channels is None and not weight.flows
    if not fits:
        raise MisfitError(f"`weight` must be a constant of int32 words, but it is {weight}")
    out_channels, kernel_h, kernel_w, _ = _map_sizes("weight", weight)
    assert isinstance(out_channels, int)
    padding = geometry["padding"]
    conv = Conv2dGeometry(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=(kernel_h, kernel_w),
        stride=pair(geometry["stride"]),
        padding=(padding,) * 4 if isinstance(padding, int) else tuple(padding),
        dilation=pair(geometry["dilation"]),
        groups=geometry["groups"],
    )
    if weight.shape != conv.weight_shape:
        raise MisfitError(
            f"`weight` must be {list(conv.weight_shape)}, [O, KH, KW, words of "
            f"{conv.group_channels} channels], but it is {weight}"
        )
    require_clear_bits(weight, conv.group_channels)
    return batch, out_channels, *conv.output_size(height, width)


def require_clear_bits(weight: Value, channels: int) -> None:
    """Require that the bits after the last channel are 0."""
    used = channels % WORD_BITS
    if used and weight.constant is not None:
        unused = weight.constant[..., -1] >> used
        # A shift keeps the sign: bit 31 is one of the unused ones.
        require(not bool(unused.any()), f"`weight` has bits after its {channels} channels")


def _epilogue_sizes(
    bits: Value, weight: Value, multiplier: Value, bias: Value, named: Mapping[str, Any]
) -> tuple[Size, int, int, int]:
    """Check the steps after the accumulators; return the sizes of the result."""
    batch, channels, height, width = _conv_sizes(bits, weight, named)
    vectors = {name: named.get(name) for name in VECTORS}
    require_vectors(channels, **{**vectors, "multiplier": multiplier, "bias": bias})
    clamped = named["clamp_min"] is not None or named["clamp_max"] is not None
    require(not clamped or named["slope"] is None, "`slope` excludes `clamp_min`/`clamp_max`")
    pool = Pool2dGeometry(
        kernel_size=pair(named["pool_kernel_size"]),
        stride=pair(named["pool_stride"]),
        padding=pair(named["pool_padding"]),
    )
    if not pool.is_identity:
        require(all(named[name] is None for name in SUMS), "sums of windows exclude a pool")
        height, width = pool.output_size(height, width)
    shape = (batch, channels, height, width)
    residual = named["residual"]
    if residual is not None:
        require_dtype("residual", residual, STREAMS)
        require(residual.shape == shape, f"`residual` (={residual}) must have the result's shape")
    _require_gate(named["gate"], named["offset"], shape)
    return shape


def _require_gate(gate: Value | None, offset: Value | None, shape: tuple[Size, ...]) -> None:
    if gate is None:
        require(offset is None, "`offset` needs a gate")
        return
    require_dtype("gate", gate, STREAMS)
    batch, channels = (*gate.shape, None, None)[:2]
    fits = gate.rank in (2, 4) and all(size == 1 for size in gate.shape[2:])
    fits = fits and batch in (1, shape[0]) and channels in (1, shape[1])
    require(fits, f"`gate` (={gate}) must have a number for each image and channel, or for all")


def _conv(bits: Value, weight: Value, **named: Any) -> Value:
    return Value(torch.int32, _conv_sizes(bits, weight, named))


def _conv_float(
    bits: Value, weight: Value, multiplier: Value, bias: Value, dtype: torch.dtype, **named: Any
) -> Value:
    return Value(dtype, _epilogue_sizes(bits, weight, multiplier, bias, named))


def _conv_bits(bits: Value, weight: Value, multiplier: Value, bias: Value, **named: Any) -> Value:
    return _packed(*_epilogue_sizes(bits, weight, multiplier, bias, named))


def _conv_float_bits(
    bits: Value, weight: Value, multiplier: Value, bias: Value, dtype: torch.dtype, **named: Any
) -> tuple[Value, ...]:
    shape = _epilogue_sizes(bits, weight, multiplier, bias, named)
    return Value(dtype, shape), _packed(*shape)


def _geometry_errors(rule: Rule) -> Rule:
    """Return a rule that raises MisfitError instead of GeometryError."""

    def checked(**named: Any) -> Result:
        try:
            return rule(**named)
        except GeometryError as error:
            raise MisfitError(str(error)) from error

    return checked


# -- rows ------------------------------------------------------------------------------------------


def _constant_parameters(named: Mapping[str, Any], result: Any) -> bool:
    """Require that only maps are computed: computed parameters may come from several images."""
    return all(
        (value.flows and rows.is_batch(value)) if name in _FLOWING else not value.flows
        for name, value in named.items()
        if isinstance(value, Value)
    )


# -- arguments -------------------------------------------------------------------------------------

_INF = float("inf")
_MOST = torch.finfo(torch.float32).max
_ONE_FLOAT = number(-_MOST, _MOST)
STREAM = Kind("float32, float16 or bfloat16", lambda v: DTYPE.accepts(v) and v in STREAMS)
_LIMIT = optional(
    Kind("a number that float32 can hold", lambda v: _ONE_FLOAT.accepts(v) or v in (_INF, -_INF))
)
_OPTIONAL = optional(TENSOR)


_STEPS, _PADS, _SIDES = integers((2,), 1), integers((2,), 0), integers((4,), 0)

_GEOMETRY = {
    "in_channels": COUNT,
    "stride": _STEPS,
    "padding": _SIDES,
    "dilation": _STEPS,
    "groups": COUNT,
}
_EPILOGUE = {
    "residual": _OPTIONAL,
    **{"pool_kernel_size": _STEPS, "pool_stride": _STEPS},
    "pool_padding": _PADS,
    **dict.fromkeys(STEPS, _OPTIONAL),
    **dict.fromkeys(NUMBERS, _LIMIT),
}
_OPERANDS = dict.fromkeys(("bits", "weight", "multiplier", "bias"), TENSOR)
_OUTGOING = {"threshold": TENSOR, "sense": TENSOR}
_DTYPE = {"dtype": STREAM}


def _operator(name: str, arguments: dict[str, Kind], result: Rule) -> Operator:
    return Operator(
        name=f"biper.{name}",
        target=getattr(_biper, name).default,
        arguments=arguments,
        result=_geometry_errors(result),
        rows=_constant_parameters,
    )


OPERATORS: list[Operator] = [
    _operator("binarize", {"x": TENSOR, "threshold": _OPTIONAL, "sense": _OPTIONAL}, _binarize),
    _operator("unbinarize", {"bits": TENSOR, "channels": COUNT, **_DTYPE}, _unbinarize),
    _operator(
        "bmaxpool2d",
        {
            **{"bits": TENSOR, "channels": COUNT, "kernel_size": _STEPS},
            **{"stride": _STEPS, "padding": _PADS, "take_and": _OPTIONAL},
        },
        _max_pool,
    ),
    _operator("bconv2d", {"bits": TENSOR, "weight": TENSOR, **_GEOMETRY}, _conv),
    _operator("bconv2d_float", {**_OPERANDS, **_DTYPE, **_EPILOGUE, **_GEOMETRY}, _conv_float),
    _operator("bconv2d_bits", {**_OPERANDS, **_OUTGOING, **_EPILOGUE, **_GEOMETRY}, _conv_bits),
    _operator(
        "bconv2d_float_bits",
        {**_OPERANDS, **_OUTGOING, **_DTYPE, **_EPILOGUE, **_GEOMETRY},
        _conv_float_bits,
    ),
]
