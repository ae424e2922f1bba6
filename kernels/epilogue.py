"""The epilogue of a binary convolution, on one tile of accumulators.

Its steps, their order and their rounding follow the engine's numeric contract: float32, each step
rounded once, none contracted. Kernels that use it are compiled with `launch.EXACT`.

The interpreter is less exact than the GPU: its fma rounds twice, and its cast to bfloat16
truncates. There, both are written out in integers; compiled kernels do not contain that code.
"""

import triton
import triton.language as tl

from . import launch, tiles

INTERPRETED = tl.constexpr(launch.INTERPRETED)


@triton.jit
def _fma_by_odd_rounding(a, b, c):
    """Return a * b + c rounded once, with float64 arithmetic.

    The product is exact in float64. The sum is rounded to odd (its last bit is set if the exact
    sum, known from the error term, is not a float64), so that rounding it to float32 is right.
    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE TC 2008.
    """
    product = a.to(tl.float64) * b.to(tl.float64)
    addend = c.to(tl.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    inexact = (error > 0) | (error < 0)  # False for a NaN, from infinities
    bits = total.to(tl.int64, bitcast=True)
    away = (error > 0) == (total > 0)  # the exact sum is further from 0 than `total`
    odd = tl.where(away, bits + 1, bits - 1)
    bits = tl.where(inexact & ((bits & 1) == 0), odd, bits)
    return bits.to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def fma(a, b, c):
    """Return a * b + c of float32 tiles, rounded once."""
    if INTERPRETED:
        return _fma_by_odd_rounding(a, b, c)
    else:
        return tl.fma(a, b, c)


@triton.jit
def rounded(v, DTYPE: tl.constexpr):
    """Return float32 values rounded to nearest, ties to even, in the stream's type."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return v.to(DTYPE)


@triton.jit
def operand(v, DTYPE: tl.constexpr):
    """Return float32 values rounded to the type in which a matrix unit multiplies them.

    The interpreter would multiply the bit patterns of bfloat16, so it widens them again, exactly.
    """
    if INTERPRETED:
        return rounded(v, DTYPE).to(tl.float32)
    else:
        return v.to(DTYPE)


@triton.jit
def bits_of(v, threshold, sense):
    """Return `sense ? v <= threshold : v >= threshold`; False for a NaN."""
    return tl.where(sense != 0, v <= threshold, v >= threshold)


@triton.jit
def clamped(v, clamp_min, clamp_max):
    """Return `v < lo ? lo : v`, then `v > hi ? hi : v`; limits as in `finish`."""
    if clamp_min is not None:
        low = clamp_min.to(tl.float32, bitcast=True)
        v = tl.where(v < low, low, v)
    if clamp_max is not None:
        high = clamp_max.to(tl.float32, bitcast=True)
        v = tl.where(v > high, high, v)
    return v


@triton.jit
def leave(
    v,
    pixel0,
    valid,
    channel0,
    out_channels,
    float_ptr,
    packed_ptr,
    threshold_ptr,
    sense_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store a tile of float32 values, rounded to the stream's type, and their bits; see `finish`.

    Without thresholds a bit is `v >= 0`; without senses it is `v >= threshold`.
    """
    channel = channel0 + tl.arange(0, COLUMNS)
    there = channel < out_channels
    row = tl.arange(0, ROWS)
    if float_ptr is not None:
        place = row[:, None] * out_channels + channel[None, :]
        tl.store(
            float_ptr + pixel0 * out_channels + place,
            rounded(v, float_ptr.dtype.element_ty),
            mask=valid[:, None] & there[None, :],
        )
    if packed_ptr is not None:
        threshold = tl.zeros((COLUMNS,), tl.float32)
        if threshold_ptr is not None:
            threshold = tl.load(threshold_ptr + channel, mask=there, other=0.0)
        if sense_ptr is not None:
            sense = tl.load(sense_ptr + channel, mask=there, other=0)
            bits = bits_of(v, threshold[None, :], sense[None, :])
        else:
            bits = v >= threshold[None, :]
        words = tiles.pack(bits & there[None, :], ROWS, COLUMNS // 32)
        count = (out_channels + 31) // 32
        word = channel0 // 32 + tl.arange(0, COLUMNS // 32)
        tl.store(
            packed_ptr + pixel0 * count + (row[:, None] * count + word[None, :]),
            words,
            mask=valid[:, None] & (word < count)[None, :],
        )


@triton.jit
def finish(
    dot,
    pixel0,
    valid,
    channel0,
    out_channels,
    accumulator_ptr,
    float_ptr,
    packed_ptr,
    multiplier_ptr,
    bias_ptr,
    residual_ptr,
    slope_ptr,
    shift_ptr,
    threshold_ptr,
    sense_ptr,
    clamp_min,
    clamp_max,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Apply the epilogue to a tile of pooled accumulators, and store the outputs.

    `dot` is int32 [ROWS, COLUMNS]. `valid` [ROWS] says which pixels exist, and `pixel0` is the
    tile's first pixel in the list of all output pixels. `channel0` is the first of its output
    channels, a multiple of 32; the tile may go beyond the last channel. ROWS * O is below 2^31.

    Outputs: `accumulator_ptr`, int32 [pixels, O], and then nothing else; or `float_ptr`,
    [pixels, O] of the stream's type, and `packed_ptr`, int32 [pixels, ceil(O / 32)]. An output that
    is None is not stored, and a step whose operand is None is skipped.

    Operands: `residual_ptr` [pixels, O] of any stream type, `sense_ptr` uint8 [O], all others
    float32 [O]. The limits of the clamp are the int32 with the bits of a float32: a scalar -0.0
    would lose its sign when it is passed to a kernel.
    """
    channel = channel0 + tl.arange(0, COLUMNS)
    there = channel < out_channels
    row = tl.arange(0, ROWS)
    place = row[:, None] * out_channels + channel[None, :]
    mask = valid[:, None] & there[None, :]
    base = pixel0 * out_channels
    if accumulator_ptr is not None:
        tl.store(accumulator_ptr + base + place, dot, mask=mask)
    else:
        multiplier = tl.load(multiplier_ptr + channel, mask=there, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=there, other=0.0)
        v = dot.to(tl.float32)
        v = fma(
            tl.broadcast_to(multiplier[None, :], (ROWS, COLUMNS)),
            v,
            tl.broadcast_to(bias[None, :], (ROWS, COLUMNS)),
        )
        if residual_ptr is not None:
            v = v + tl.load(residual_ptr + base + place, mask=mask, other=0.0).to(tl.float32)
        v = clamped(v, clamp_min, clamp_max)
        if slope_ptr is not None:
            slope = tl.load(slope_ptr + channel, mask=there, other=0.0)
            v = tl.where(v < 0.0, v * slope[None, :], v)
        if shift_ptr is not None:
            v = v + tl.load(shift_ptr + channel, mask=there, other=0.0)[None, :]
        leave(
            v, pixel0, valid, channel0, out_channels, float_ptr, packed_ptr, threshold_ptr,
            sense_ptr, ROWS, COLUMNS,
        )  # fmt: skip
