from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from biper_engine.geometry import Pool2dGeometry
from biper_engine.ops import bmaxpool2d
from tests.ops.matrix import MAP_POOLS as POOLS
from tests.ops.matrix import packed


def pooled(signs: Tensor, pool: Pool2dGeometry) -> Tensor:
    return F.max_pool2d(signs, pool.kernel_size, pool.stride, pool.padding)


def random_signs(*shape: int) -> Tensor:
    ones = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0))
    return ones.float() * 2 - 1


@pytest.mark.some(37)
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("channels", [1, 31, 32, 33, 65])
def test_windows_are_joined_by_or_or_and(
    device: torch.device, need: Callable[..., None], channels: int, pool: Pool2dGeometry
) -> None:
    need("bmaxpool2d")
    signs = random_signs(2, channels, 7, 5)
    take_and = torch.arange(channels) % 2 == 0
    largest, smallest = pooled(signs, pool) > 0, -pooled(-signs, pool) > 0
    bits = packed(signs > 0).to(device)
    result = bmaxpool2d(bits, channels, pool)
    assert result.dtype == torch.int32
    assert result.is_contiguous()
    assert torch.equal(result.cpu(), packed(largest))
    mixed = torch.where(take_and.view(1, -1, 1, 1), smallest, largest)
    assert torch.equal(bmaxpool2d(bits, channels, pool, take_and.to(device)).cpu(), packed(mixed))


@pytest.mark.parametrize("bit", [False, True])
def test_padding_never_wins(device: torch.device, need: Callable[..., None], bit: bool) -> None:
    need("bmaxpool2d")
    pool = Pool2dGeometry(kernel_size=(4, 4), padding=(2, 2))
    uniform = packed(torch.full((1, 33, 3, 3), bit)).to(device)
    take_and = torch.arange(33, device=device) % 2 == 0
    result = bmaxpool2d(uniform, 33, pool, take_and)
    assert torch.equal(result.cpu(), packed(torch.full((1, 33, 4, 4), bit)))


def test_unused_bits_do_not_change_the_result(
    device: torch.device, need: Callable[..., None]
) -> None:
    need("bmaxpool2d")
    pool = Pool2dGeometry(kernel_size=(2, 2), stride=(2, 2))
    clean = packed(random_signs(1, 33, 4, 4) > 0).to(device)
    dirty = clean.clone()
    dirty[..., -1] |= -2
    take_and = torch.arange(33, device=device) % 2 == 0
    for directions in (None, take_and, ~take_and):
        expected = bmaxpool2d(clean, 33, pool, directions)
        result = bmaxpool2d(dirty, 33, pool, directions)
        assert torch.equal(result, expected)
        assert torch.equal(result[..., -1] & -2, torch.zeros_like(result[..., -1]))


def test_strides_do_not_change_the_result(device: torch.device, need: Callable[..., None]) -> None:
    need("bmaxpool2d")
    words = torch.randint(-(2**31), 2**31 - 1, (4, 6, 8, 4), dtype=torch.int32).to(device)
    strided = words[::2, 1:, ::2, ::2]
    pool = Pool2dGeometry(kernel_size=(2, 2))
    result = bmaxpool2d(strided, 64, pool)
    assert torch.equal(result, bmaxpool2d(strided.contiguous(), 64, pool))
    assert result.is_contiguous()


def test_an_empty_batch_passes_through(device: torch.device, need: Callable[..., None]) -> None:
    need("bmaxpool2d")
    empty = torch.zeros(0, 5, 5, 2, dtype=torch.int32, device=device)
    assert bmaxpool2d(empty, 33, POOLS[0]).shape == (0, 2, 2, 2)
