from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from biper_engine.ops.reference import to_channels_last
from biper_engine.ops.rounding import fma

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALLEST_DENORMAL = 2.0**-149
LARGEST = float.fromhex("0x1.fffffep127")

Oracle = Callable[[float, float, float], float]
Comparison = Callable[[Tensor, Tensor], bool]


@given(FLOATS, FLOATS, FLOATS)
@example(0.0, -1.0, -0.0)
@example(0.0, -1.0, 0.0)
@example(-0.0, -0.0, -0.0)
@example(2.0**-100, 2.0**-100, -0.0)
@example(-(2.0**-100), 2.0**-100, 0.0)
@example(LARGEST, LARGEST, -LARGEST)
@example(LARGEST, 1.0, 2.0**103)
@example(LARGEST, 1.0, 2.0**102)
@example(SMALLEST_DENORMAL, 0.5, 0.0)
@example(SMALLEST_DENORMAL, 0.5, SMALLEST_DENORMAL)
@example(SMALLEST_DENORMAL, 0.5, 2.0**-20)
@example(3 * SMALLEST_DENORMAL, 0.5, -(2.0**-149))
@example(1.5, 1.5, -2.25)
def test_fma_is_rounded_once(
    exact_fma: Oracle, same_bytes: Comparison, a: float, b: float, c: float
) -> None:
    result = fma(torch.tensor([a]), torch.tensor([b]), torch.tensor([c]))
    assert result.dtype == torch.float32
    assert same_bytes(result, torch.tensor([exact_fma(a, b, c)])), (result.item(), a, b, c)


@given(st.integers(0, 2**22 - 1), st.integers(-60, 60), st.integers(26, 80), st.booleans())
def test_fma_survives_double_rounding(
    exact_fma: Oracle, same_bytes: Comparison, odd: int, scale: int, below: int, add: bool
) -> None:
    # 3 * (an odd 24-bit integer) below 2^25 lies half way between two float32; the addend decides.
    mantissa = 2**23 + 1 + 2 * (odd % 2**20)
    a, b = mantissa * 2.0**scale, 3.0
    c = (1.0 if add else -1.0) * mantissa * 2.0 ** (scale - below)
    result = fma(torch.tensor([a]), torch.tensor([b]), torch.tensor([c]))
    assert same_bytes(result, torch.tensor([exact_fma(a, b, c)]))


def test_the_double_rounding_cases_are_real(exact_fma: Oracle) -> None:
    mantissas = [2**23 + 1 + 2 * i for i in range(100)]
    naive = [torch.tensor(3.0 * m + 2.0**-40, dtype=torch.float64).float() for m in mantissas]
    exact = [exact_fma(float(m), 3.0, 2.0**-40) for m in mantissas]
    wrong = sum(float(n) != e for n, e in zip(naive, exact, strict=True))
    assert wrong == 50  # ties to even go the wrong way half of the time


def test_fma_broadcasts_and_passes_infinities() -> None:
    a = torch.tensor([torch.inf, 2.0, -1.0]).view(3, 1)
    result = fma(a, torch.tensor([1.0, -1.0]), torch.tensor(1.0))
    expected = torch.tensor([[torch.inf, -torch.inf], [3.0, -1.0], [0.0, 2.0]])
    assert torch.equal(result, expected)
    assert fma(torch.tensor(torch.inf), torch.tensor(0.0), torch.tensor(1.0)).isnan()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (2, 1, 3, 1), (0, 3, 2, 2)])
def test_channels_last_strides_hold_also_for_sizes_of_one(shape: tuple[int, ...]) -> None:
    n, c, h, w = shape
    x = torch.randn(shape)
    result = to_channels_last(x)
    assert result.stride() == torch.empty(n, h, w, c).permute(0, 3, 1, 2).stride()
    assert torch.equal(result, x)
