"""Binary weights: few values per output channel, and their split into terms."""

import pytest
import torch

from biper_engine.conversion.weights import BinaryWeight, analyse_weight
from tests.conversion.foreign_models import WEIGHTS

LATENT = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_way_to_binarise_is_recognised(name: str) -> None:
    weight = WEIGHTS[name](LATENT)
    split = analyse_weight(weight)
    assert isinstance(split, BinaryWeight), split
    # (sign - c) + c rounds twice, at numbers up to 4
    torch.testing.assert_close(split.weight(), weight.double(), rtol=0, atol=4 * 2.0**-23)


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 0.0), (0.25, 0.75), (2.0, 2.0)])
def test_two_values_are_exact_also_when_one_is_zero(values: tuple[float, float]) -> None:
    weight = torch.where(LATENT > 0, values[0], values[1])
    split = analyse_weight(weight)
    assert isinstance(split, BinaryWeight)
    assert split.zeros == int((weight == 0).sum())
    assert torch.equal(split.weight(), weight.double())
    assert split.terms == 1  # what two values have in common needs no convolution


def test_scales_may_differ_and_vanish_per_channel() -> None:
    scale = torch.tensor([1.0, -0.5, 0.0, 1e-8, 3e4, 1.0]).view(-1, 1, 1, 1)
    split = analyse_weight(torch.sign(LATENT) * scale)
    assert isinstance(split, BinaryWeight)
    assert split.terms == 1
    torch.testing.assert_close(split.weight(), (torch.sign(LATENT) * scale).double())


def test_channels_with_zeros_are_the_mean_of_two_terms() -> None:
    weight = torch.sign(LATENT) * 0.5
    weight[0, 0, 0, 0] = 0
    weight[3, 1, 1:] = 0
    weight[5] = 0
    split = analyse_weight(weight)
    assert isinstance(split, BinaryWeight)
    assert split.second is not None
    assert split.zeros == 7
    assert torch.equal(split.weight(), weight.double())
    assert split.scale.tolist() == [0.25, 0.5, 0.5, 0.25, 0.5, 0]
    assert split.second.scale.tolist() == [0.25, 0, 0, 0.25, 0, 0]
    assert bool(split.positive[0, 0, 0, 0])
    assert not bool(split.second.positive[0, 0, 0, 0])


def test_channels_may_be_ternary_symmetric_and_pairs_in_one_weight() -> None:
    weight = torch.sign(LATENT)
    weight[0, 0, 0, 0] = 0
    weight[1] = torch.where(LATENT[1] > 0, 0.75, 0.25)
    split = analyse_weight(weight)
    assert isinstance(split, BinaryWeight)
    assert split.zeros == 1
    assert torch.equal(split.weight(), weight.double())


def test_another_shape_is_the_same_weight() -> None:
    weight = torch.where(LATENT.abs() < 0.5, 0.0, torch.sign(LATENT))
    split = analyse_weight(weight.flatten(1))
    assert isinstance(split, BinaryWeight)
    assert torch.equal(split.reshaped((-1, 5, 3, 3)).weight(), weight.double())


def test_real_weights_are_refused() -> None:
    assert analyse_weight(LATENT) == "has 270 distinct values"
    assert analyse_weight(torch.sin(20 * LATENT)) == "has 270 distinct values"
    assert analyse_weight(LATENT * 1e-9) == "has 270 distinct values"
    pruned = LATENT * (LATENT.abs() > 0.5)
    assert "distinct values" in str(analyse_weight(pruned))
    single = LATENT[:, :2, 0, 0] * torch.tensor([1.0, 0.0])
    assert analyse_weight(single) == "has 7 distinct values"


def test_one_channel_with_three_values_is_enough_to_refuse() -> None:
    weight = torch.sign(LATENT)
    weight[2, 0, 0, 0] = 0.5
    assert isinstance(analyse_weight(weight), str)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.sign(LATENT)
    weight[1, 0, 0, 0] = value
    assert analyse_weight(weight) == "has values that are infinite or NaN"
