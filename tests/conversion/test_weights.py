"""Binary weights: two values per output channel, and how they are split."""

import pytest
import torch
from torch import Tensor

from biper_engine.conversion.weights import BinaryWeight, analyse_weight
from tests.conversion.foreign_models import WEIGHTS

LATENT = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))


def rebuilt(split: BinaryWeight) -> Tensor:
    shape = [-1] + [1] * (split.positive.dim() - 1)
    signs = torch.where(split.positive, 1.0, -1.0).double()
    return signs * split.scale.view(shape) + split.offset.view(shape)


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_way_to_binarise_is_recognised(name: str) -> None:
    weight = WEIGHTS[name](LATENT)
    split = analyse_weight(weight, "float")
    assert isinstance(split, BinaryWeight), split
    # (sign - c) + c rounds twice, at numbers up to 4
    torch.testing.assert_close(rebuilt(split), weight.double(), rtol=0, atol=4 * 2.0**-23)


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 0.0), (0.25, 0.75), (2.0, 2.0)])
@pytest.mark.parametrize("zero_weights", ["float", "positive"])
def test_two_values_are_exact_also_when_one_is_zero(
    values: tuple[float, float], zero_weights: str
) -> None:
    weight = torch.where(LATENT > 0, values[0], values[1])
    split = analyse_weight(weight, zero_weights)
    assert isinstance(split, BinaryWeight)
    assert split.zeros == 0
    assert torch.equal(rebuilt(split), weight.double())


def test_scales_may_differ_and_vanish_per_channel() -> None:
    scale = torch.tensor([1.0, -0.5, 0.0, 1e-8, 3e4, 1.0]).view(-1, 1, 1, 1)
    split = analyse_weight(torch.sign(LATENT) * scale, "float")
    assert isinstance(split, BinaryWeight)
    torch.testing.assert_close(rebuilt(split), (torch.sign(LATENT) * scale).double())


def test_exact_zeros_are_refused_and_counted() -> None:
    weight = torch.sign(LATENT)
    weight[0, 0, 0, 0] = 0
    assert "1 of 270 values that is exactly 0" in str(analyse_weight(weight, "float"))
    weight[3, 1, 2, 2] = 0
    assert "2 of 270 values that are exactly 0" in str(analyse_weight(weight, "float"))
    split = analyse_weight(weight, "positive")
    assert isinstance(split, BinaryWeight)
    assert split.zeros == 2
    assert bool(split.positive[0, 0, 0, 0])


@pytest.mark.parametrize("zero_weights", ["float", "positive"])
def test_real_weights_are_refused(zero_weights: str) -> None:
    assert analyse_weight(LATENT, zero_weights) == "has 270 distinct values"
    assert analyse_weight(torch.sin(20 * LATENT), zero_weights) == "has 270 distinct values"
    tiny = LATENT * 1e-9
    assert analyse_weight(tiny, zero_weights) == "has 270 distinct values"


def test_one_channel_with_three_values_is_enough_to_refuse() -> None:
    weight = torch.sign(LATENT)
    weight[2, 0, 0, 0] = 0.5
    assert isinstance(analyse_weight(weight, "float"), str)
