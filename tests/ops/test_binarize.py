from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine import bits as contract
from biper_engine.ops import binarize, unbinarize
from tests.ops.matrix import (
    CHANNELS,
    SMALLEST_DENORMAL,
    STREAMS,
    met_thresholds,
    packed,
    random_map,
)


@pytest.mark.parametrize("channels", CHANNELS)
def test_threshold_and_sense_act_per_channel(
    device: torch.device, need: Callable[..., None], channels: int
) -> None:
    need("binarize")
    x = random_map(2, channels, 3, 5)
    for dtype in STREAMS.values():
        signs = binarize(x.to(device, dtype))
        assert signs.dtype == torch.int32
        assert signs.is_contiguous()
        assert torch.equal(signs.cpu(), packed(x.to(dtype) >= 0))
    threshold = met_thresholds(x)
    sense = torch.arange(channels) % 3 == 1
    limit, flipped = threshold.view(1, -1, 1, 1), sense.view(1, -1, 1, 1)
    expected = torch.where(flipped, x <= limit, x >= limit)
    result = binarize(x.to(device), threshold.to(device), sense.to(device))
    assert torch.equal(result.cpu(), packed(expected))
    alone = binarize(x.to(device), threshold.to(device))
    assert torch.equal(alone.cpu(), packed(x >= limit))
    about_zero = binarize(x.to(device), None, sense.to(device))
    assert torch.equal(about_zero.cpu(), packed(torch.where(flipped, x <= 0, x >= 0)))


def test_zeros_denormals_infinities_and_nan(
    device: torch.device, need: Callable[..., None]
) -> None:
    need("binarize")
    values = torch.tensor(
        [0.0, -0.0, SMALLEST_DENORMAL, -SMALLEST_DENORMAL, torch.inf, -torch.inf, torch.nan]
    )
    x = values.view(1, -1, 1, 1).to(device)
    tiny = torch.full((7,), SMALLEST_DENORMAL, device=device)
    sense = torch.ones(7, dtype=torch.bool, device=device)

    def unpacked(word: Tensor) -> list[bool]:
        return contract.unpack_channels(word.cpu(), 7).flatten().tolist()

    assert unpacked(binarize(x)) == [True, True, True, False, True, False, False]
    assert unpacked(binarize(x, tiny)) == [False, False, True, False, True, False, False]
    assert unpacked(binarize(x, None, sense)) == [True, True, False, True, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_thresholds_of_half_maps_are_compared_in_float32(
    device: torch.device, need: Callable[..., None], dtype: torch.dtype
) -> None:
    need("binarize")
    x = torch.ones(1, 2, 1, 1, dtype=dtype, device=device)
    threshold = torch.tensor([1 + 2.0**-20, 1 - 2.0**-20], device=device)
    assert binarize(x, threshold).item() == 0b10


@pytest.mark.parametrize("channels", [32, 33])
def test_strides_do_not_change_the_result(
    device: torch.device, need: Callable[..., None], channels: int
) -> None:
    need("binarize")
    wide = random_map(4, 2 * channels, 6, 10).to(device)
    strided = wide[::2, ::2, ::3, 1::2]
    expected = packed(strided.cpu() >= 0)
    for x in (
        strided,
        strided.contiguous(),
        strided.contiguous(memory_format=torch.channels_last),
        strided.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
    ):
        result = binarize(x)
        assert result.is_contiguous()
        assert torch.equal(result.cpu(), expected)
    expanded = wide[:1, :1, :1, :1].expand(2, channels, 3, 3)
    assert torch.equal(binarize(expanded).cpu(), packed(expanded.cpu() >= 0))


@pytest.mark.parametrize("shape", [(0, 33, 3, 3), (2, 33, 0, 3), (2, 33, 3, 0)])
def test_empty_maps_pass_through(
    device: torch.device, need: Callable[..., None], shape: tuple[int, ...]
) -> None:
    need("binarize")
    need("unbinarize")
    packed_map = binarize(torch.zeros(shape, device=device))
    assert packed_map.shape == (shape[0], shape[2], shape[3], 2)
    assert unbinarize(packed_map, 33).shape == shape


@pytest.mark.some(37)
@pytest.mark.parametrize("dtype", STREAMS.values())
@pytest.mark.parametrize("channels", CHANNELS)
def test_unbinarize_gives_signs_in_channels_last(
    device: torch.device, need: Callable[..., None], channels: int, dtype: torch.dtype
) -> None:
    need("unbinarize")
    signs = torch.where(random_map(2, channels, 3, 5) >= 0, 1.0, -1.0)
    result = unbinarize(packed(signs > 0).to(device), channels, dtype=dtype)
    assert result.dtype == dtype
    assert result.stride() == (15 * channels, 1, 5 * channels, channels)
    assert torch.equal(result.cpu().float(), signs)


@pytest.mark.parametrize("channels", [1, 33, 65])
def test_unused_bits_do_not_change_the_result(
    device: torch.device, need: Callable[..., None], channels: int
) -> None:
    need("unbinarize")
    clean = packed(random_map(1, channels, 2, 2) >= 0).to(device)
    dirty = clean.clone()
    dirty[..., -1] |= -1 << channels % 32
    assert torch.equal(unbinarize(dirty, channels), unbinarize(clean, channels))


def test_unbinarize_ignores_strides(device: torch.device, need: Callable[..., None]) -> None:
    need("unbinarize")
    words: Any = torch.randint(-(2**31), 2**31 - 1, (2, 4, 3, 6), dtype=torch.int32)
    strided = words.to(device)[:, ::2, :, ::3]
    assert torch.equal(unbinarize(strided, 64), unbinarize(strided.contiguous(), 64))
