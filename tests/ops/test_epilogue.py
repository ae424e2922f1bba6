"""The epilogue compared with scalar arithmetic: a rational fma, then NumPy float32, by steps."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from biper_engine import bits as contract
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops import Epilogue, bconv2d_bits, bconv2d_float, bconv2d_float_bits, prepack
from biper_engine.ops.epilogue import SUMS
from tests.ops.matrix import (
    CONVOLUTIONS,
    EPILOGUE_CONV,
    EPILOGUE_PAIRS,
    EPILOGUE_POOLS,
    EPILOGUE_SIZE,
    EPILOGUE_TRIPLES,
    SMALLEST_DENORMAL,
    STREAMS,
    ZEROS,
    Operands,
    epilogue_of,
    float64_convolution,
    residual_of,
    signed_zeros,
    vector,
    with_met_thresholds,
)

CONV, SIZE, POOLS = EPILOGUE_CONV, EPILOGUE_SIZE, EPILOGUE_POOLS

Array = npt.NDArray[Any]


def pooled(dot: Array, pool: Pool2dGeometry, smallest: Array) -> Array:
    (kh, kw), (sh, sw), (ph, pw) = pool.kernel_size, pool.stride, pool.padding
    n, c, height, width = dot.shape
    rows, columns = pool.output_size(height, width)
    result = np.empty((n, c, rows, columns), dot.dtype)
    for y in range(rows):
        for x in range(columns):
            top, left = y * sh - ph, x * sw - pw
            window = dot[:, :, max(top, 0) : top + kh, max(left, 0) : left + kw]
            result[:, :, y, x] = np.where(
                smallest, window.min(axis=(2, 3)), window.max(axis=(2, 3))
            )
    return result


def expected_values(
    dot: Tensor,
    epilogue: Epilogue,
    residual: Tensor | None,
    exact_fma: Callable[..., float],
    gate: Tensor | None = None,
) -> Array:
    """Return v of every output, one scalar operation after the other."""
    channels = dot.shape[1]
    none = torch.zeros(channels, dtype=torch.bool)
    smallest = none if epilogue.pool_min is None else epilogue.pool_min
    values = pooled(dot.numpy(), epilogue.pool, smallest.numpy())
    result = np.empty(values.shape, np.float32)
    factors = None if gate is None else gate.reshape(*gate.shape[:2]).expand(*values.shape[:2])
    for index in np.ndindex(*values.shape):
        o = index[1]
        v = np.float32(
            exact_fma(float(epilogue.multiplier[o]), float(values[index]), float(epilogue.bias[o]))
        )
        if factors is not None:
            factor = factors[index[:2]].item()
            if epilogue.offset is None:
                v = v * np.float32(factor)
            else:
                v = np.float32(exact_fma(float(v), factor, epilogue.offset[o].item()))
        if residual is not None:
            v = v + np.float32(residual[index].item())
        if epilogue.clamp_min is not None and v < np.float32(epilogue.clamp_min):
            v = np.float32(epilogue.clamp_min)
        if epilogue.clamp_max is not None and v > np.float32(epilogue.clamp_max):
            v = np.float32(epilogue.clamp_max)
        factor = epilogue.slope if v < 0 else epilogue.gain
        if factor is not None:
            v = v * np.float32(factor[o].item())
        if epilogue.shift is not None:
            v = v + np.float32(epilogue.shift[o].item())
        result[index] = v
    return result


def stored(values: Array, dtype: torch.dtype) -> Tensor:
    """Return values rounded to nearest, ties to even, by other means than torch's."""
    if dtype == torch.float32:
        return torch.from_numpy(values)
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return torch.from_numpy(values.astype(np.float16))
    word = values.view(np.uint32).astype(np.uint64)
    upper = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    return torch.from_numpy(upper.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def packed(values: Array, threshold: Tensor, sense: Tensor) -> Tensor:
    limit = threshold.numpy().reshape(1, -1, 1, 1)
    bits = np.where(sense.numpy().reshape(1, -1, 1, 1), values <= limit, values >= limit)
    return contract.pack_channels(torch.from_numpy(bits).permute(0, 2, 3, 1))


def moved(epilogue: Epilogue, device: torch.device) -> Epilogue:
    tensors: dict[str, Any] = {
        name: tensor.to(device) for name, tensor in epilogue.tensors().items()
    }
    return dataclasses.replace(epilogue, **tensors)


def check_all_outputs(
    data: Any,
    conv: Conv2dGeometry,
    epilogue: Epilogue,
    residual: Tensor | None,
    values: Array,
    device: torch.device,
    same_bytes: Callable[..., bool],
    gate: Tensor | None = None,
) -> None:
    """Run the three fused operators and compare every byte that they give."""
    assert epilogue.threshold is not None
    assert epilogue.sense is not None
    bits = packed(values, epilogue.threshold, epilogue.sense)
    operands = (data.bits.to(device), data.weight.to(device), conv, moved(epilogue, device))
    given = {"residual": residual, "gate": gate}
    extra: Any = {name: x.to(device) for name, x in given.items() if x is not None}
    assert torch.equal(bconv2d_bits(*operands, **extra).cpu(), bits)
    for dtype in STREAMS.values():
        floats = stored(values, dtype)
        assert same_bytes(bconv2d_float(*operands, **extra, dtype=dtype), floats)
        both = bconv2d_float_bits(*operands, **extra, dtype=dtype)
        assert same_bytes(both[0], floats)
        assert torch.equal(both[1].cpu(), bits)
        assert both[0].is_contiguous(memory_format=torch.channels_last)
        assert both[1].is_contiguous()


def need_all(
    need: Callable[..., None],
    conv: Conv2dGeometry,
    epilogue: Epilogue | None = None,
    *more: str,
) -> None:
    for op in ("bconv2d_float", "bconv2d_bits", "bconv2d_float_bits"):
        need(op, conv, frozenset(more) | (frozenset() if epilogue is None else epilogue.steps()))


@functools.cache
def step_case(
    pool: str, activation: str, residual_stream: str | None, fma: Callable[..., float]
) -> tuple[Any, Epilogue, Tensor | None, Array]:
    """Return operands, epilogue and residual, and the values that they must give."""
    channels, data = CONV.out_channels, Operands(CONV, SIZE, 2)
    epilogue = epilogue_of(channels, pool, activation)
    size = POOLS[pool].output_size(*CONV.output_size(*SIZE))
    residual = residual_of(residual_stream, 2, channels, *size)
    values = expected_values(data.dot, epilogue, residual, fma)
    return data, with_met_thresholds(epilogue, torch.from_numpy(values)), residual, values


@pytest.mark.some(32)
@pytest.mark.parametrize(
    ("pool", "activation", "residual_stream"),
    [
        pytest.param(*case, marks=() if case in EPILOGUE_PAIRS else (pytest.mark.weekly,))
        for case in EPILOGUE_TRIPLES
    ],
)
def test_every_step_is_rounded_once_and_in_order(
    device: torch.device,
    need: Callable[..., None],
    exact_fma: Callable[..., float],
    same_bytes: Callable[..., bool],
    pool: str,
    activation: str,
    residual_stream: str | None,
) -> None:
    data, epilogue, residual, values = step_case(pool, activation, residual_stream, exact_fma)
    need_all(need, CONV, epilogue)
    check_all_outputs(data, CONV, epilogue, residual, values, device, same_bytes)


SUMMED = ("everything", "asymmetric padding", "three groups of 40", "1x1 strided", "127 channels")


@pytest.mark.some(8)
@pytest.mark.parametrize("name", SUMMED)
def test_other_sums_are_integers_of_what_a_window_sees(
    device: torch.device,
    need: Callable[..., None],
    exact_fma: Callable[..., float],
    same_bytes: Callable[..., bool],
    name: str,
) -> None:
    conv, size = CONVOLUTIONS[name]
    data, channels = Operands(conv, size, 2), conv.out_channels
    base = epilogue_of(channels, "no pool", "prelu")
    factors = {name: vector(channels, 0.0, seed=7 + i, scale=0.1) for i, name in enumerate(SUMS)}
    ones, seen = torch.ones_like(data.weight_signs), torch.ones_like(data.signs)
    sums = [
        float64_convolution(*operands, conv).numpy()
        for operands in ((data.signs, ones), (seen, data.weight_signs), (seen, ones))
    ]
    for present in itertools.chain(([name] for name in SUMS), [SUMS]):
        epilogue = dataclasses.replace(base, **{name: factors[name] for name in present})
        need_all(need, conv, epilogue)
        values = np.empty(data.dot.shape, np.float32)
        for index in np.ndindex(*values.shape):
            o = index[1]
            v = float(
                exact_fma(float(base.multiplier[o]), float(data.dot[index]), base.bias[o].item())
            )
            for factor, total in zip(SUMS, sums, strict=True):
                if factor in present:
                    v = exact_fma(float(factors[factor][o]), float(total[index]), v)
            result = np.float32(v)
            assert base.slope is not None
            assert base.shift is not None
            if result < 0:
                result = result * np.float32(base.slope[o].item())
            values[index] = result + np.float32(base.shift[o].item())
        whole = with_met_thresholds(epilogue, torch.from_numpy(values))
        check_all_outputs(data, conv, whole, None, values, device, same_bytes)


def test_other_sums_exclude_a_pool() -> None:
    conv, data = constant_operands(5, 2)
    epilogue = with_bits(
        multiplier=torch.ones(2), bias=torch.ones(2), taps=torch.ones(2), pool=POOLS["2x2"]
    )
    with pytest.raises(ValueError, match="`taps` and `valid` exclude a pool"):
        bconv2d_float(data.bits.expand(1, 2, 2, 1), data.weight, conv, epilogue)


def constant_operands(channels: int, filters: int) -> tuple[Conv2dGeometry, Any]:
    """Return a 1x1 convolution of one pixel whose every accumulator is `channels`."""

    class Ones:
        bits = contract.pack_channels(torch.ones(1, 1, 1, channels, dtype=torch.bool))
        weight = contract.pack_weight(torch.ones(filters, channels, 1, 1, dtype=torch.bool))
        dot = torch.full((1, filters, 1, 1), channels, dtype=torch.int32)

    conv = Conv2dGeometry(in_channels=channels, out_channels=filters, kernel_size=(1, 1))
    return conv, Ones()


def with_bits(**options: Any) -> Epilogue:
    channels = options["multiplier"].shape[0]
    defaults = {"threshold": torch.zeros(channels), "sense": torch.zeros(channels).bool()}
    return Epilogue(**{**defaults, **options})


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_fma_is_rounded_once_where_twice_would_differ(
    device: torch.device,
    need: Callable[..., None],
    exact_fma: Callable[..., float],
    same_bytes: Callable[..., bool],
    sign: float,
) -> None:
    # dot = 3 times an odd 24-bit multiplier lies half way between two float32, and a bias beyond
    # the last place of float64 decides: mul and add, or an fma in float64, both go wrong.
    conv, data = constant_operands(3, 64)
    need_all(need, conv)
    mantissa = 2.0**23 + 1 + 2 * torch.arange(64)
    multiplier = mantissa * 2.0**-23
    bias = torch.where(torch.arange(64) % 4 < 2, 2.0**-70, -(2.0**-70)) * sign
    threshold = torch.tensor(
        [exact_fma(float(m), 3.0, float(b)) for m, b in zip(multiplier, bias, strict=True)]
    )
    epilogue = with_bits(multiplier=multiplier, bias=bias, threshold=threshold)
    naive = (multiplier.double() * 3 + bias.double()).float()
    assert 0 < int((naive != threshold).sum()) < 64
    values = threshold.view(1, 64, 1, 1).numpy()
    check_all_outputs(data, conv, epilogue, None, values, device, same_bytes)


def test_signed_zeros_survive_clamp_slope_and_shift(
    device: torch.device, need: Callable[..., None], same_bytes: Callable[..., bool]
) -> None:
    conv, data = constant_operands(5, 2)
    need_all(need, conv)
    zeros = torch.tensor(ZEROS)
    for options, expected in signed_zeros(2):
        epilogue = with_bits(multiplier=zeros, bias=zeros, **options)
        values = expected.view(1, 2, 1, 1).numpy()
        check_all_outputs(data, conv, epilogue, None, values, device, same_bytes)


def test_clamp_limits_are_rounded_to_float32_once(
    device: torch.device, need: Callable[..., None], same_bytes: Callable[..., bool]
) -> None:
    conv, data = constant_operands(1, 2)
    need_all(need, conv)
    tenth = float(np.float32(0.1))  # above 0.1, so a comparison in float64 would clamp it
    values = np.array([tenth, tenth], np.float32).reshape(1, 2, 1, 1)
    epilogue = with_bits(
        multiplier=torch.tensor([tenth, 7.0]),
        bias=torch.zeros(2),
        clamp_max=0.1,
        threshold=torch.full((2,), tenth),
    )
    check_all_outputs(data, conv, epilogue, None, values, device, same_bytes)


def test_overflow_gives_infinities(
    device: torch.device, need: Callable[..., None], same_bytes: Callable[..., bool]
) -> None:
    conv, data = constant_operands(3, 2)
    need_all(need, conv)
    multiplier = torch.tensor([3.0e38, -3.0e38])
    for limit in (None, 65519.0, 65520.0):  # the float16 stream overflows from 65520 on
        values = np.array([limit or np.inf, -np.inf], np.float32).reshape(1, 2, 1, 1)
        epilogue = with_bits(multiplier=multiplier, bias=torch.zeros(2), clamp_max=limit)
        check_all_outputs(data, conv, epilogue, None, values, device, same_bytes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bits_come_from_the_float32_value_and_not_from_the_stream(
    device: torch.device, need: Callable[..., None], dtype: torch.dtype
) -> None:
    conv, data = constant_operands(1, 2)
    need("bconv2d_float_bits", conv)
    v, between = 1 + 2.0**-20, 1 + 2.0**-21  # v is stored as 1, below the threshold
    epilogue = with_bits(
        multiplier=torch.full((2,), v),
        bias=torch.zeros(2),
        threshold=torch.full((2,), between),
        sense=torch.tensor([False, True]),
    )
    operands = (data.bits.to(device), data.weight.to(device), conv, moved(epilogue, device))
    floats, bits = bconv2d_float_bits(*operands, dtype=dtype)
    assert torch.equal(floats.cpu(), torch.ones(1, 2, 1, 1, dtype=dtype))
    assert bits.item() == 0b01


def test_a_threshold_of_the_smallest_denormal_means_positive(
    device: torch.device, need: Callable[..., None]
) -> None:
    conv, data = constant_operands(1, 4)
    need("bconv2d_bits", conv)
    epilogue = with_bits(
        multiplier=torch.tensor([0.0, -0.0, SMALLEST_DENORMAL, -SMALLEST_DENORMAL]),
        bias=torch.tensor([0.0, -0.0, 0.0, 0.0]),
        threshold=torch.full((4,), SMALLEST_DENORMAL),
    )
    operands = (data.bits.to(device), data.weight.to(device), conv, moved(epilogue, device))
    assert bconv2d_bits(*operands).item() == 0b0100


@pytest.mark.parametrize("pool", ["2x2", "3x3 padded"])
def test_pooling_accumulators_by_the_sign_of_the_multiplier_pools_the_float_map(
    device: torch.device,
    need: Callable[..., None],
    operands: Any,
    same_bytes: Callable[..., bool],
    pool: str,
) -> None:
    need("bconv2d_float", CONV)
    data, window = operands(CONV, SIZE, 2), POOLS[pool]
    multiplier = vector(CONV.out_channels, 0.0, seed=1)
    bias = vector(CONV.out_channels, seed=2)
    shared = (data.bits.to(device), data.weight.to(device), CONV)
    unpooled = bconv2d_float(*shared, moved(Epilogue(multiplier=multiplier, bias=bias), device))
    epilogue = Epilogue(multiplier=multiplier, bias=bias, pool=window, pool_min=multiplier < 0)
    expected = F.max_pool2d(unpooled.cpu(), window.kernel_size, window.stride, window.padding)
    assert same_bytes(bconv2d_float(*shared, moved(epilogue, device)), expected)


def test_the_pool_ignores_its_padding_where_every_accumulator_is_negative(
    device: torch.device, need: Callable[..., None], same_bytes: Callable[..., bool]
) -> None:
    conv = Conv2dGeometry(in_channels=4, out_channels=2, kernel_size=(1, 1))
    need("bconv2d_float", conv)
    ones = contract.pack_channels(torch.ones(1, 3, 3, 4, dtype=torch.bool)).to(device)
    weight = contract.pack_weight(
        torch.tensor([False, True]).expand(4, 1, 1, 2).permute(3, 0, 1, 2)
    )
    epilogue = Epilogue(
        multiplier=torch.ones(2),
        bias=torch.zeros(2),
        pool=Pool2dGeometry(kernel_size=(2, 2), padding=(1, 1)),
        pool_min=torch.tensor([False, True]),
    )
    expected = torch.tensor([-4.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    result = bconv2d_float(ones, weight.to(device), conv, moved(epilogue, device))
    assert same_bytes(result, expected)


@pytest.mark.parametrize("batch", [0, 1])
def test_prepacked_weights_odd_strides_and_empty_batches_keep_every_byte(
    backend: str,
    device: torch.device,
    need: Callable[..., None],
    operands: Any,
    same_bytes: Callable[..., bool],
    batch: int,
) -> None:
    need_all(need, CONV)
    data = operands(CONV, SIZE, batch)
    channels = CONV.out_channels
    residual = torch.randn(batch, channels, *CONV.output_size(*SIZE)).to(device)
    strided = torch.empty(*residual.shape[:3], 2 * residual.shape[3], device=device)[..., ::2]
    strided.copy_(residual)
    doubled = torch.stack([vector(channels, seed=1), vector(channels, seed=2)], 1).to(device)
    tight = with_bits(multiplier=doubled[:, 0].cpu(), bias=doubled[:, 1].cpu())
    tight = moved(tight, device)
    loose = dataclasses.replace(tight, multiplier=doubled[:, 0], bias=doubled[:, 1])
    bits, weight = data.bits.to(device), data.weight.to(device)
    prepacked = prepack(weight, CONV, backend)
    floats, packed_map = bconv2d_float_bits(bits, weight, CONV, tight, residual=residual)
    assert floats.shape[0] == packed_map.shape[0] == batch
    other = bconv2d_float_bits(bits, weight, CONV, loose, residual=strided, prepacked=prepacked)
    assert same_bytes(other[0], floats)
    assert torch.equal(other[1], packed_map)
    last = residual.contiguous(memory_format=torch.channels_last)
    assert same_bytes(bconv2d_float(bits, weight, CONV, tight, residual=last), floats)
    alone = bconv2d_bits(bits, weight, CONV, tight, residual=strided, prepacked=prepacked)
    assert torch.equal(alone, packed_map)
