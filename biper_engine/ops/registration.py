"""Schemas of `torch.ops.biper`, their shape functions, and the dispatch of calls to backends.

The operators take flat arguments, as torch requires. Here they become `Conv2dGeometry`,
`Pool2dGeometry` and `Epilogue`, are checked once, and go to the selected backend. The fakes run the
same checks, so a wrong shape is found while tracing, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from biper_engine.bits import words
from biper_engine.errors import GeometryError
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops import backends, checks
from biper_engine.ops.cpu import CpuBackend
from biper_engine.ops.cuda import CudaBackend
from biper_engine.ops.epilogue import NUMBERS, SCHEMA, VECTORS, Epilogue, steps_of
from biper_engine.ops.readable import in_memory, refuse_tangents
from biper_engine.ops.reference import ReferenceBackend
from biper_engine.ops.triton import TritonBackend

__all__ = ["DTYPE", "LIBRARY", "SCHEMAS", "conv_geometry", "empty_map", "empty_packed", "register"]

_GEOMETRY = (
    "int in_channels, int[2] stride=1, int[4] padding=0, int[2] dilation=1, int groups=1, "
    "Tensor? prepacked=None"
)
_EPILOGUE = f"Tensor? residual=None, {SCHEMA}"
_OPERANDS = "Tensor bits, Tensor weight, Tensor multiplier, Tensor bias"
# None is float32. With a dtype as its default, torch would drop that dtype from traced calls, and
# AOTInductor would write its number, which it then refuses to load.
DTYPE = "ScalarType? dtype=None"

SCHEMAS = {
    "binarize": "(Tensor x, Tensor? threshold=None, Tensor? sense=None) -> Tensor",
    "unbinarize": f"(Tensor bits, int channels, *, {DTYPE}) -> Tensor",
    "bmaxpool2d": (
        "(Tensor bits, int channels, int[2] kernel_size, *, int[2] stride, int[2] padding=0, "
        "Tensor? take_and=None) -> Tensor"
    ),
    "prepack": (
        "(Tensor weight, *, int in_channels, int[2] stride=1, int[4] padding=0, int[2] dilation=1, "
        "int groups=1, str backend) -> Tensor"
    ),
    "bconv2d": f"(Tensor bits, Tensor weight, *, {_GEOMETRY}) -> Tensor",
    "bconv2d_float": f"({_OPERANDS}, *, {DTYPE}, {_EPILOGUE}, {_GEOMETRY}) -> Tensor",
    "bconv2d_bits": (
        f"({_OPERANDS}, Tensor threshold, Tensor sense, *, {_EPILOGUE}, {_GEOMETRY}) -> Tensor"
    ),
    "bconv2d_float_bits": (
        f"({_OPERANDS}, Tensor threshold, Tensor sense, *, {DTYPE}, {_EPILOGUE}, {_GEOMETRY})"
        " -> (Tensor, Tensor)"
    ),
}

LIBRARY = torch.library.Library("biper", "DEF")  # type: ignore[no-untyped-call, unused-ignore]


def conv_geometry(weight: Tensor, options: Mapping[str, Any]) -> Conv2dGeometry:
    """Return the geometry of a binary convolution of packed weights and keyword arguments.

    Raises:
        GeometryError: the values make no geometry.
    """
    if weight.dim() != 4:
        raise GeometryError(
            f"`weight` must be [O, KH, KW, words], but its shape is {tuple(weight.shape)}."
        )

    def integers(name: str, length: int, default: int) -> tuple[Any, ...]:
        value = options.get(name, default)
        return (value,) * length if isinstance(value, int) else tuple(value)

    return Conv2dGeometry(
        in_channels=options["in_channels"],
        out_channels=weight.shape[0],
        kernel_size=(weight.shape[1], weight.shape[2]),
        stride=integers("stride", 2, 1),
        padding=integers("padding", 4, 0),
        dilation=integers("dilation", 2, 1),
        groups=options.get("groups", 1),
    )


def split_options(
    weight: Tensor, multiplier: Tensor, bias: Tensor, options: dict[str, Any]
) -> tuple[Conv2dGeometry, Epilogue, Tensor | None, Tensor | None]:
    """Return geometry, epilogue, residual and prepacked weights of flat keyword arguments."""
    geometry = conv_geometry(weight, options)
    pool = Pool2dGeometry(
        kernel_size=tuple(options.get("pool_kernel_size", (1, 1))),
        stride=tuple(options.get("pool_stride", (1, 1))),
        padding=tuple(options.get("pool_padding", (0, 0))),
    )
    named: dict[str, Any] = {name: options.get(name) for name in (*VECTORS, *NUMBERS)}
    epilogue = Epilogue(pool=pool, **{**named, "multiplier": multiplier, "bias": bias})
    return geometry, epilogue, options.get("residual"), options.get("prepacked")


def _check_fused(
    bits: Tensor,
    weight: Tensor,
    geometry: Conv2dGeometry,
    epilogue: Epilogue,
    residual: Tensor | None,
    gate: Tensor | None,
    prepacked: Tensor | None,
    wants_bits: bool,
) -> tuple[int, int, int, int]:
    """Check every operand; return the output's logical shape [N, O, OH, OW]."""
    size = checks.check_conv(bits, weight, geometry, prepacked)
    if not epilogue.pool.is_identity:
        size = epilogue.pool.output_size(*size)
    checks.check_epilogue(epilogue, geometry.out_channels, bits.device, wants_bits=wants_bits)
    shape = (bits.shape[0], geometry.out_channels, *size)
    checks.check_residual(residual, shape, bits.device)
    checks.check_gate(gate, epilogue, shape, bits.device)
    return shape


def empty_map(like: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """Return an empty float map [N, C, H, W] as shape functions promise it: channels_last."""
    n, c, h, w = shape
    return like.new_empty((n, h, w, c), dtype=dtype).permute(0, 3, 1, 2)


def empty_packed(like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Return an empty packed map of [N, C, H, W] as shape functions promise it."""
    n, c, h, w = shape
    return like.new_empty((n, h, w, words(c)), dtype=torch.int32)


# -- maps -----------------------------------------------------------------------------------------


def _check_binarize(x: Tensor, threshold: Tensor | None, sense: Tensor | None) -> None:
    checks.check_float_map("x", x)
    checks.check_per_channel({"threshold": threshold, "sense": sense}, x.shape[1], x.device)


def _binarize(x: Tensor, threshold: Tensor | None = None, sense: Tensor | None = None) -> Tensor:
    _check_binarize(x, threshold, sense)
    return backends.select("binarize", None, x.device).binarize(x, threshold, sense)


def _binarize_fake(
    x: Tensor, threshold: Tensor | None = None, sense: Tensor | None = None
) -> Tensor:
    _check_binarize(x, threshold, sense)
    n, c, h, w = x.shape
    return empty_packed(x, (n, c, h, w))


def _unbinarize(bits: Tensor, channels: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    checks.check_packed_map("bits", bits, channels)
    checks.check_dtype("dtype", dtype)
    return backends.select("unbinarize", None, bits.device).unbinarize(bits, channels, dtype)


def _unbinarize_fake(bits: Tensor, channels: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    checks.check_packed_map("bits", bits, channels)
    checks.check_dtype("dtype", dtype)
    n, h, w, _ = bits.shape
    return empty_map(bits, (n, channels, h, w), dtype)


def _check_pool(
    bits: Tensor,
    channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    take_and: Tensor | None,
) -> Pool2dGeometry:
    checks.check_packed_map("bits", bits, channels)
    checks.check_per_channel({"take_and": take_and}, channels, bits.device)
    pool = Pool2dGeometry(
        kernel_size=tuple(kernel_size),  # type: ignore[arg-type]
        stride=tuple(stride),  # type: ignore[arg-type]
        padding=tuple(padding),  # type: ignore[arg-type]
    )
    pool.output_size(bits.shape[1], bits.shape[2])
    return pool


def _bmaxpool2d(
    bits: Tensor,
    channels: int,
    kernel_size: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0),
    take_and: Tensor | None = None,
) -> Tensor:
    pool = _check_pool(bits, channels, kernel_size, stride, padding, take_and)
    backend = backends.select("bmaxpool2d", None, bits.device)
    return backend.bmaxpool2d(bits, channels, pool, take_and)


def _bmaxpool2d_fake(
    bits: Tensor,
    channels: int,
    kernel_size: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0),
    take_and: Tensor | None = None,
) -> Tensor:
    pool = _check_pool(bits, channels, kernel_size, stride, padding, take_and)
    rows, columns = pool.output_size(bits.shape[1], bits.shape[2])
    return empty_packed(bits, (bits.shape[0], channels, rows, columns))


# -- convolutions ---------------------------------------------------------------------------------


def _select(
    op: str,
    geometry: Conv2dGeometry,
    prepacked: Tensor | None,
    device: torch.device,
    steps: frozenset[str] = frozenset(),
) -> backends.Backend:
    backend = backends.select(op, geometry, device, steps)
    if prepacked is not None:
        checks.check_prepacked(prepacked, *backend.prepack_layout(geometry), backend.name)
    return backend


def _prepack_geometry(weight: Tensor, options: dict[str, Any]) -> Conv2dGeometry:
    geometry = conv_geometry(weight, options)
    if weight.dtype != torch.int32 or tuple(weight.shape) != geometry.weight_shape:
        raise GeometryError(
            f"`weight` must be int32 {list(geometry.weight_shape)}, but it is {weight.dtype} "
            f"{tuple(weight.shape)}."
        )
    return geometry


def _prepack(weight: Tensor, *, backend: str, **options: Any) -> Tensor:
    return backends.by_name(backend).prepack(weight, _prepack_geometry(weight, options))


def _prepack_fake(weight: Tensor, *, backend: str, **options: Any) -> Tensor:
    shape, dtype = backends.by_name(backend).prepack_layout(_prepack_geometry(weight, options))
    return weight.new_empty(shape, dtype=dtype)


def _bconv2d(bits: Tensor, weight: Tensor, **options: Any) -> Tensor:
    geometry, _, _, prepacked = split_options(weight, weight, weight, options)
    checks.check_conv(bits, weight, geometry, prepacked)
    backend = _select("bconv2d", geometry, prepacked, bits.device)
    return backend.bconv2d(bits, weight, geometry, prepacked)


def _bconv2d_fake(bits: Tensor, weight: Tensor, **options: Any) -> Tensor:
    geometry, _, _, prepacked = split_options(weight, weight, weight, options)
    size = checks.check_conv(bits, weight, geometry, prepacked)
    return empty_map(bits, (bits.shape[0], geometry.out_channels, *size), torch.int32)


def _fused(
    op: str,
    bits: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    options: dict[str, Any],
    float_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    geometry, epilogue, residual, prepacked = split_options(weight, multiplier, bias, options)
    gate = options.get("gate")
    want_bits = op != "bconv2d_float"
    _check_fused(bits, weight, geometry, epilogue, residual, gate, prepacked, want_bits)
    if float_dtype is not None:
        checks.check_dtype("dtype", float_dtype)
    backend = _select(op, geometry, prepacked, bits.device, steps_of(options))
    extra = () if gate is None else (gate,)
    return backend.bconv2d_fused(
        bits, weight, geometry, epilogue, residual, prepacked, float_dtype, want_bits, *extra
    )


def _bconv2d_float(
    bits: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor | None:
    return _fused("bconv2d_float", bits, weight, multiplier, bias, options, dtype)[0]


def _bconv2d_bits(
    bits: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    threshold: Tensor,
    sense: Tensor,
    **options: Any,
) -> Tensor | None:
    options |= {"threshold": threshold, "sense": sense}
    return _fused("bconv2d_bits", bits, weight, multiplier, bias, options, None)[1]


def _bconv2d_float_bits(
    bits: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    threshold: Tensor,
    sense: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Tensor | None, Tensor | None]:
    options |= {"threshold": threshold, "sense": sense}
    return _fused("bconv2d_float_bits", bits, weight, multiplier, bias, options, dtype)


def _fused_shape(
    bits: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    options: dict[str, Any],
    wants_bits: bool,
) -> tuple[int, int, int, int]:
    geometry, epilogue, residual, prepacked = split_options(weight, multiplier, bias, options)
    gate = options.get("gate")
    return _check_fused(bits, weight, geometry, epilogue, residual, gate, prepacked, wants_bits)


def _bconv2d_float_fake(
    bits: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor:
    shape = _fused_shape(bits, weight, multiplier, bias, options, False)
    checks.check_dtype("dtype", dtype)
    return empty_map(bits, shape, dtype)


def _bconv2d_bits_fake(
    bits: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    threshold: Tensor,
    sense: Tensor,
    **options: Any,
) -> Tensor:
    options |= {"threshold": threshold, "sense": sense}
    return empty_packed(bits, _fused_shape(bits, weight, multiplier, bias, options, True))


def _bconv2d_float_bits_fake(
    bits: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    threshold: Tensor,
    sense: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    options |= {"threshold": threshold, "sense": sense}
    shape = _fused_shape(bits, weight, multiplier, bias, options, True)
    checks.check_dtype("dtype", dtype)
    return empty_map(bits, shape, dtype), empty_packed(bits, shape)


def _checked(run: Callable[..., Any], *, on_cpu: bool) -> Callable[..., Any]:
    """Return `run` for any tensors that the dispatcher passes on."""

    def call(*operands: Any, **options: Any) -> Any:
        refuse_tangents(enumerate(operands))
        refuse_tangents(options.items())
        if on_cpu:
            operands = tuple(map(in_memory, operands))
            options = {key: in_memory(value) for key, value in options.items()}
        return run(*operands, **options)

    return call


def register(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    keys: tuple[str, ...] = ("CPU", "CUDA"),
) -> None:
    """Register an operator of `torch.ops.biper`, for devices of these dispatch keys."""
    LIBRARY.define(  # type: ignore[no-untyped-call, unused-ignore]
        name + schema, tags=(torch.Tag.pt2_compliant_tag,)
    )
    # No operator has a gradient: results never require one, even if the operands do.
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call, unused-ignore]
    for key in keys:
        call = _checked(run, on_cpu=key == "CPU")
        LIBRARY.impl(name, torch.no_grad()(call), key)  # type: ignore[no-untyped-call, unused-ignore]
    torch.library.register_fake(f"biper::{name}", fake, lib=LIBRARY)


_RUNS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "binarize": (_binarize, _binarize_fake),
    "unbinarize": (_unbinarize, _unbinarize_fake),
    "bmaxpool2d": (_bmaxpool2d, _bmaxpool2d_fake),
    "prepack": (_prepack, _prepack_fake),
    "bconv2d": (_bconv2d, _bconv2d_fake),
    "bconv2d_float": (_bconv2d_float, _bconv2d_float_fake),
    "bconv2d_bits": (_bconv2d_bits, _bconv2d_bits_fake),
    "bconv2d_float_bits": (_bconv2d_float_bits, _bconv2d_float_bits_fake),
}
"""What runs each operator, and its fake."""

for _name, (_run, _fake) in _RUNS.items():
    register(_name, SCHEMAS[_name], _run, _fake)

backends.register(CudaBackend())
backends.register(TritonBackend())
backends.register(CpuBackend())
backends.register(ReferenceBackend())
