"""Writes cases of the operator matrix, with the results of the reference backend, for replay.cpp.

All integers are int64, little-endian:

    file:    number of cases, then the cases
    case:    operator, length of the name, name, number of values, values, number of inputs,
             number of buffers (inputs, then expected outputs), buffers
    buffer:  bytes of an element, bytes (-1: absent), memory

Maps are NHWC in memory. Operators, values and buffers are described at `accumulate`, `fused`,
`binarize`, `unbinarize`, `maxpool` and `signed` below. Unused bits of words are set in all inputs:
they must not affect results.
"""

import dataclasses
import struct
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from biper_engine import ops
from biper_engine.bits import pack_channels, words
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops import Epilogue, use_backend
from biper_engine.ops.epilogue import SUMS, VECTORS
from tests.ops import matrix

STREAM_TYPES = {None: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

# Large enough for three threads, and for strips and chunks that end within the map.
LARGE = {
    "3x3": (matrix.geometry(in_channels=128, out_channels=128, padding=(1, 1, 1, 1)), (14, 14)),
    "3x3, 16 channels": (
        matrix.geometry(in_channels=16, out_channels=16, padding=(1, 1, 1, 1)),
        (70, 61),
    ),
    "1x1 read in place": (
        Conv2dGeometry(in_channels=256, out_channels=144, kernel_size=(1, 1)),
        (21, 13),
    ),
    "3x3 strided, odd channels": (
        matrix.geometry(in_channels=70, out_channels=130, stride=(2, 2), padding=(1, 1, 1, 1)),
        (35, 33),
    ),
    "3x3 dilated groups across words": (
        matrix.geometry(
            in_channels=132, out_channels=100, groups=2, dilation=(2, 1), padding=(2, 2, 1, 1)
        ),
        (23, 19),
    ),
    "groups of whole words": (
        matrix.geometry(in_channels=128, out_channels=192, groups=2, padding=(1, 0, 0, 1)),
        (19, 17),
    ),
}


def write(path: Path) -> int:
    """Write every case; return their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the maps are small
    try:
        with use_backend("reference"):
            cases = list(chain.from_iterable(make() for make in EVERYTHING))
    finally:
        torch.set_num_threads(threads)
    path.write_bytes(_integers(len(cases)) + b"".join(cases))
    return len(cases)


# -- the format -----------------------------------------------------------------------------------


def _integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _buffer(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return _integers(1, -1)
    nhwc = tensor.permute(0, 2, 3, 1) if tensor.is_floating_point() and tensor.ndim == 4 else tensor
    tight = torch.empty(nhwc.shape, dtype=tensor.dtype).copy_(nhwc)
    memory = tight.flatten().view(torch.uint8).numpy().tobytes()
    return _integers(tensor.element_size(), len(memory)) + memory


def _case(
    operator: int,
    name: str,
    values: tuple[int, ...],
    inputs: list[Tensor | None],
    outputs: list[Tensor | None],
) -> bytes:
    buffers = [*inputs, *outputs]
    head = _integers(operator, len(name)) + name.encode("ascii")
    counts = _integers(len(values), *values, len(inputs), len(buffers))
    return head + counts + b"".join(map(_buffer, buffers))


def _geometry_values(conv: Conv2dGeometry) -> tuple[int, ...]:
    return (
        *(conv.in_channels, conv.out_channels, conv.groups),
        *(*conv.kernel_size, *conv.stride, *conv.padding, *conv.dilation),
    )


def _pool_values(pool: Pool2dGeometry) -> tuple[int, ...]:
    return (*pool.kernel_size, *pool.stride, *pool.padding)


def _dirty(packed: Tensor, channels: int) -> Tensor:
    """Return words whose unused bits are set."""
    dirty = packed.clone()
    if channels % 32:
        dirty[..., -1] |= -1 << channels % 32
    return dirty


def _conv_inputs(data: Any, conv: Conv2dGeometry) -> list[Tensor | None]:
    return [_dirty(data.weight, conv.group_channels), _dirty(data.bits, conv.in_channels)]


# -- one case of each operator --------------------------------------------------------------------


def accumulate(name: str, conv: Conv2dGeometry, data: Any) -> bytes:
    """Operator 0: geometry, batch, height, width; weight, bits -> dots."""
    values = (*_geometry_values(conv), *data.bits.shape[:3])
    dots = ops.bconv2d(data.bits, data.weight, conv).permute(0, 2, 3, 1)
    return _case(0, name, values, _conv_inputs(data, conv), [dots])


def fused(
    name: str,
    conv: Conv2dGeometry,
    data: Any,
    epilogue: Epilogue,
    residual: Tensor | None,
    dtype: torch.dtype | None,
    want_bits: bool,
    gate: Tensor | None = None,
) -> bytes:
    """Operator 1: geometry, pool, batch, height, width, types of residual and map, sizes of gate;

    weight, bits, vectors of the epilogue, sense, pool_min, clamp limits [2], residual, gate ->
    float map, bits.
    """
    operands = (data.bits, data.weight, conv, epilogue)
    floats = packed = None
    if dtype is not None:
        floats = ops.bconv2d_float(*operands, residual=residual, gate=gate, dtype=dtype)
    if want_bits:
        packed = ops.bconv2d_bits(*operands, residual=residual, gate=gate)
    low, high = epilogue.clamp_min, epilogue.clamp_max
    limits = torch.tensor([-torch.inf if low is None else low, torch.inf if high is None else high])
    values = (
        *(*_geometry_values(conv), *_pool_values(epilogue.pool), *data.bits.shape[:3]),
        STREAM_TYPES[None if residual is None else residual.dtype],
        STREAM_TYPES[dtype],
        *((0, 0) if gate is None else gate.shape),
    )
    vectors = (entry for entry, dtype in VECTORS.items() if dtype == torch.float32)
    tensors = [getattr(epilogue, entry) for entry in (*vectors, "sense", "pool_min")]
    inputs = [*_conv_inputs(data, conv), *tensors, limits, residual, gate]
    return _case(1, name, values, inputs, [floats, packed])


def binarize(name: str, x: Tensor, threshold: Tensor | None, sense: Tensor | None) -> bytes:
    """Operator 2: pixels, channels, type; x, threshold, sense -> bits."""
    values = (x.numel() // x.shape[1], x.shape[1], STREAM_TYPES[x.dtype])
    return _case(2, name, values, [x, threshold, sense], [ops.binarize(x, threshold, sense)])


def unbinarize(name: str, bits: Tensor, channels: int, dtype: torch.dtype) -> bytes:
    """Operator 3: pixels, channels, type; bits -> x."""
    values = (bits[..., 0].numel(), channels, STREAM_TYPES[dtype])
    x = ops.unbinarize(bits, channels, dtype=dtype)
    return _case(3, name, values, [_dirty(bits, channels)], [x])


def maxpool(
    name: str, bits: Tensor, channels: int, pool: Pool2dGeometry, take_and: Tensor | None
) -> bytes:
    """Operator 4: batch, height, width, channels, pool; bits, take_and -> bits."""
    values = (*bits.shape[:3], channels, *_pool_values(pool))
    out = ops.bmaxpool2d(bits, channels, pool, take_and)
    return _case(4, name, values, [_dirty(bits, channels), take_and], [out])


def signed(name: str, conv: Conv2dGeometry, x: Tensor, weight: Tensor, alpha: Tensor) -> bytes:
    """Operator 5: geometry, batch, height, width, whether it runs on bits; x, weight, alpha -> map.

    The map is 0 where it doesn't.
    """
    top, bottom, left, right = conv.padding
    padded = F.pad(x.sign(), (left, right, top, bottom))
    options = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    out = F.conv2d(padded, weight.sign(), **options) * alpha.view(-1, 1, 1)
    on_bits = all(bool((values.abs() > 0).all()) for values in (x, weight))
    values = (*_geometry_values(conv), x.shape[0], *x.shape[2:], int(on_bits))
    return _case(5, name, values, [x, weight, alpha], [out if on_bits else out.zero_()])


# -- all of them ----------------------------------------------------------------------------------


class _Extreme:
    """Operands whose every bit differs from its weight's, or none: the largest sums."""

    def __init__(self, conv: Conv2dGeometry, size: tuple[int, int], sign: int) -> None:
        shape = (2, *size, words(conv.in_channels))
        self.bits = torch.full(shape, -1, dtype=torch.int32)
        self.weight = torch.full(conv.weight_shape, -(sign > 0), dtype=torch.int32)


def accumulators() -> Iterator[bytes]:
    for name, (conv, size) in matrix.CONVOLUTIONS.items():
        for batch in (2, 0):
            data = matrix.Operands(conv, size, batch)
            yield accumulate(f"accumulators, {name}, batch {batch}", conv, data)
    for name, (conv, size) in LARGE.items():
        yield accumulate(f"accumulators, large {name}", conv, matrix.Operands(conv, size, 2))
    deep = matrix.geometry(in_channels=1024, out_channels=40, padding=(1, 1, 1, 1))
    for sign in (-1, 1):
        yield accumulate(f"accumulators, extreme {sign}", deep, _Extreme(deep, (3, 4), sign))


OUTPUTS = [(dtype, bits) for dtype in (None, *matrix.STREAMS.values()) for bits in (False, True)]
OUTPUTS.remove((None, False))


def _with_outputs(
    name: str,
    conv: Conv2dGeometry,
    size: tuple[int, int],
    epilogue: Epilogue,
    stream: str | None,
    outputs: list[tuple[torch.dtype | None, bool]] = OUTPUTS,
    batch: int = 2,
) -> Iterator[bytes]:
    """Yield a case for each of `outputs`, every channel meeting its threshold."""
    data = matrix.Operands(conv, size, batch)
    shape = epilogue.pool.output_size(*conv.output_size(*size))
    residual = matrix.residual_of(stream, batch, conv.out_channels, *shape)
    values = ops.bconv2d_float(data.bits, data.weight, conv, epilogue, residual=residual)
    if batch > 0:
        epilogue = matrix.with_met_thresholds(epilogue, values)
    for dtype, bits in outputs:
        wanted = f"{dtype}{' and bits' if bits else ''}, residual {stream}"
        yield fused(f"{name}, to {wanted}", conv, data, epilogue, residual, dtype, bits)


def gates() -> Iterator[bytes]:
    conv, size, batch = matrix.EPILOGUE_CONV, matrix.EPILOGUE_SIZE, 3
    wide = matrix.geometry(in_channels=70, out_channels=67, kernel_size=(1, 1))
    for geometry, sides in ((conv, size), (wide, (1, 1))):
        channels, data = geometry.out_channels, matrix.Operands(geometry, sides, batch)
        epilogue = matrix.epilogue_of(channels, "no pool", "prelu")
        epilogue = dataclasses.replace(
            epilogue, threshold=torch.zeros(channels), sense=torch.arange(channels) > 9
        )
        shape = (batch, channels, *geometry.output_size(*sides))
        residual = matrix.residual_of("float32", *shape)
        for offset in (None, matrix.vector(channels, seed=9)):
            for sizes in ((batch, channels), (batch, 1), (1, channels), (1, 1)):
                gate = torch.randn(sizes, generator=torch.Generator().manual_seed(8))
                gated = dataclasses.replace(epilogue, offset=offset)
                name = f"gate {sizes}, {channels} channels, {'no ' * (offset is None)}offset"
                extra = (residual, torch.float32, True)
                yield fused(name, geometry, data, gated, *extra, gate)


def epilogues() -> Iterator[bytes]:
    conv, size = matrix.EPILOGUE_CONV, matrix.EPILOGUE_SIZE
    both = [(torch.float32, True)]
    for pool in matrix.EPILOGUE_POOLS:
        for activation in matrix.ACTIVATIONS:
            for stream in (None, *matrix.STREAMS):
                epilogue = matrix.epilogue_of(conv.out_channels, pool, activation)
                yield from _with_outputs(f"{activation}, {pool}", conv, size, epilogue, stream)
    for name, (other, other_size) in matrix.CONVOLUTIONS.items():
        epilogue = matrix.epilogue_of(other.out_channels, "no pool", "prelu")
        yield from _with_outputs(f"prelu, {name}", other, other_size, epilogue, "float16", both)
        sums = {
            entry: matrix.vector(other.out_channels, seed=7 + i, scale=0.1)
            for i, entry in enumerate(SUMS)
        }
        epilogue = dataclasses.replace(epilogue, **sums)
        yield from _with_outputs(f"sums, {name}", other, other_size, epilogue, None, both)
    empty = plain(conv.out_channels)
    yield from _with_outputs("empty batch", conv, size, empty, "float32", both, batch=0)


def plain(channels: int, **options: Any) -> Epilogue:
    """Return the epilogue of most layers: no slope, no shift, bits for v >= threshold."""
    return Epilogue(
        multiplier=matrix.vector(channels, seed=1, scale=0.02),
        bias=matrix.vector(channels, seed=2, scale=0.3),
        threshold=torch.zeros(channels),
        sense=torch.zeros(channels, dtype=torch.bool),
        **options,
    )


def large_epilogues() -> Iterator[bytes]:
    wanted = [(None, True), (torch.float32, False), (torch.float32, True)]
    for name, (conv, size) in LARGE.items():
        yield from plain_cases(f"large {name}", conv, size, wanted[::2], ("float32",))
        for pool, stream in (("2x2", "bfloat16"), ("3x3 padded", None)):
            epilogue = matrix.epilogue_of(conv.out_channels, pool, "prelu")
            outputs = [(torch.float16, True)]
            yield from _with_outputs(f"large {name}, {pool}", conv, size, epilogue, stream, outputs)
    for channels in (1, 4, 16, 20, 32, 33, 64, 68, 80, 96, 127, 128):
        conv = matrix.geometry(out_channels=channels, padding=(1, 1, 1, 1))
        yield from plain_cases(f"{channels} filters", conv, (5, 7), wanted)


def plain_cases(
    name: str,
    conv: Conv2dGeometry,
    size: tuple[int, int],
    outputs: list[tuple[torch.dtype | None, bool]],
    residuals: tuple[str | None, ...] = (None, "float32"),
) -> Iterator[bytes]:
    data = matrix.Operands(conv, size, 2)
    for stream in residuals:
        residual = matrix.residual_of(stream, 2, conv.out_channels, *conv.output_size(*size))
        for options in ({}, matrix.ACTIVATIONS["hardtanh"]):
            epilogue = plain(conv.out_channels, **options)
            for dtype, bits in outputs:
                title = f"plain, {name}, {options}, residual {stream}, to {dtype} {bits}"
                yield fused(title, conv, data, epilogue, residual, dtype, bits)


# Where rounding to the half formats goes up, down, to even, to 0 and to infinity.
FLOAT_EDGES = [
    *(0.0, -0.0, 65504.0, 65519.0, 65519.996, 65520.0, 65536.0, 3.4028235e38, torch.inf),
    *(2.0**-14, 2.0**-14 - 2.0**-25, 2.0**-24, 2.0**-25, 2.0**-25 + 2.0**-48, 3 * 2.0**-25),
    *(1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-8, 1 + 3 * 2.0**-8),
    *(2.0**-126, 2.0**-127, 2.0**-133, 2.0**-134, 3 * 2.0**-134, matrix.SMALLEST_DENORMAL),
]


def _patterns(dtype: Any, like: torch.dtype, count: int) -> Tensor:
    """Return floats of random bit patterns, none of them NaN."""
    limits = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(6)
    patterns = torch.randint(limits.min, limits.max, (count,), generator=generator, dtype=dtype)
    values = patterns.view(like)
    return torch.where(values.isnan(), torch.zeros((), dtype=like), values)


def conversions() -> Iterator[bytes]:
    """Yield cases that store and load floats of every kind; every accumulator is 1."""
    edges = torch.tensor(FLOAT_EDGES)
    values = torch.cat([edges, -edges, _patterns(torch.int32, torch.float32, 2001)])
    channels = values.numel()
    conv = Conv2dGeometry(in_channels=1, out_channels=channels, kernel_size=(1, 1))
    data = _Extreme(conv, (1, 1), 1)
    minus_zero = torch.full((channels,), -0.0)  # so that v + bias is v, also where v is -0.0
    epilogue = dataclasses.replace(plain(channels), multiplier=values, bias=minus_zero)
    for dtype, bits in OUTPUTS:
        yield fused(f"stored floats, {dtype}", conv, data, epilogue, None, dtype, bits)
    through = dataclasses.replace(epilogue, multiplier=minus_zero)
    for dtype in (torch.float16, torch.bfloat16):
        residual = _patterns(torch.int16, dtype, 2 * channels).view(2, channels, 1, 1)
        for stored in (torch.float32, dtype):
            yield fused(f"loaded {dtype}", conv, data, through, residual, stored, True)


def signed_zeros() -> Iterator[bytes]:
    """Yield cases of whole vectors and of a part of one; every accumulator is 5."""
    for channels in (64, 2):
        conv = Conv2dGeometry(in_channels=5, out_channels=channels, kernel_size=(1, 1))
        zeros = torch.tensor(matrix.ZEROS * (channels // 2))
        for number, (options, _) in enumerate(matrix.signed_zeros(channels)):
            changes = {"multiplier": zeros, "bias": zeros, **options}
            epilogue = dataclasses.replace(plain(channels), **changes)
            name = f"signed zeros {number}, {channels} filters"
            data = _Extreme(conv, (3, 3), 1)
            yield fused(name, conv, data, epilogue, None, torch.float32, True)


def maps() -> Iterator[bytes]:
    shapes = [(2, channels, 3, 5) for channels in matrix.CHANNELS]
    for shape in (*shapes, (0, 33, 3, 3), (1, 65, 80, 81)):
        x, channels = matrix.random_map(*shape), shape[1]
        bits = pack_channels((x > 0).permute(0, 2, 3, 1))
        sense = torch.arange(channels) % 3 == 1
        for dtype in matrix.STREAMS.values():
            name = f"{shape}, {dtype}"
            stored = x.to(dtype)
            yield binarize(f"binarize {name}", stored, None, None)
            yield unbinarize(f"unbinarize {name}", bits, channels, dtype)
            if shape[0] > 0:
                threshold = matrix.met_thresholds(stored.float())
                yield binarize(f"binarize {name}, thresholds", stored, threshold, None)
                yield binarize(f"binarize {name}, senses", stored, threshold, sense)
        yield from pools(shape, bits)


def pools(shape: tuple[int, ...], bits: Tensor) -> Iterator[bytes]:
    take_and = torch.arange(shape[1]) % 2 == 0
    for pool in matrix.MAP_POOLS:
        values = _pool_values(pool)
        for directions in (None, take_and):
            mode = "or" if directions is None else "and"
            yield maxpool(f"maxpool {shape}, {values}, {mode}", bits, shape[1], pool, directions)


def signed_maps() -> Iterator[bytes]:
    generator = torch.Generator().manual_seed(5)
    for name, (conv, size) in (matrix.CONVOLUTIONS | LARGE).items():
        x = torch.randn(2, conv.in_channels, *size, generator=generator)
        weight = torch.randn(
            conv.out_channels, conv.group_channels, *conv.kernel_size, generator=generator
        )
        alpha = torch.randn(conv.out_channels, generator=generator)
        yield signed(f"signs, {name}", conv, x, weight, alpha)
    last = (..., -1, -1)
    for value in (0.0, -0.0, torch.nan):
        spoilt = x.clone()
        spoilt[last] = value
        yield signed(f"signs, a map with {value}", conv, spoilt, weight, alpha)
        spoilt = weight.clone()
        spoilt[last] = value
        yield signed(f"signs, weights with {value}", conv, x, spoilt, alpha)


EVERYTHING = (
    *(accumulators, epilogues, gates, conversions, signed_zeros, large_epilogues),
    *(signed_maps, maps),
)
