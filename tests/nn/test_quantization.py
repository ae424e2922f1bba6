"""Measures of binary weights against formulas and numbers of the paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from biper_engine import models
from biper_engine.nn import (
    BinaryConv2d,
    BinaryLinear,
    binary_layers,
    laplace_error,
    set_binarizers,
    weight_errors,
)


def test_the_closed_form_has_the_papers_maximum() -> None:
    assert laplace_error(0.954882) == pytest.approx(0.102835, abs=5e-7)
    assert laplace_error(0.954882) > max(laplace_error(0.93), laplace_error(0.98))


@pytest.mark.parametrize(
    ("u", "error"), [(0.1, 0.0094), (0.2, 0.0320), (0.5, 0.0888), (2, 0.0986), (4, 0.0958)]
)
def test_values_of_the_closed_form(u: float, error: float) -> None:
    assert laplace_error(u) == pytest.approx(error, abs=5e-5)


def test_ends_of_the_closed_form() -> None:
    assert laplace_error(0) == 0
    assert laplace_error(1e-9) == pytest.approx(0, abs=1e-15)
    assert laplace_error(1e9) == pytest.approx(0.5 - (2 / math.pi) ** 2)
    with pytest.raises(ValueError, match="must be 0 or more"):
        laplace_error(-1)


def test_laplace_weights_have_the_error_of_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = BinaryLinear(1000, 1000, frequency=10.0)
    uniform = torch.rand(layer.weight.shape, generator=generator) - 0.5
    laplace = -0.03 * uniform.sign() * torch.log1p(-2 * uniform.abs())
    layer.weight = nn.Parameter(laplace)
    (found,) = weight_errors(layer).values()
    assert found.spread == pytest.approx(0.03, rel=3e-3)
    assert found.error == pytest.approx(laplace_error(0.3), abs=2e-4)
    assert found.closed_form == pytest.approx(laplace_error(0.3), abs=2e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_both_measures_follow_their_definitions(stage: int) -> None:
    layer = BinaryConv2d(3, 4, 3, frequency=20.0, stage=stage)
    real = torch.sin(20.0 * layer.weight.detach())
    best = min(
        float((real - scale * real.sign()).square().mean())
        for scale in torch.linspace(0, 1, 2001).tolist()
    )
    (found,) = weight_errors(layer).values()
    assert found.error == pytest.approx(best, abs=1e-6)
    assert found.official == pytest.approx(float((real - real.sign()).abs().mean()))


def test_another_wave_is_measured_without_a_closed_form() -> None:
    layer = BinaryConv2d(3, 4, 3, frequency=20.0)
    set_binarizers(layer, weight="sawtooth")
    (found,) = weight_errors(layer).values()
    assert found.closed_form is None
    assert 0 < found.error < found.official


def test_layers_of_other_papers_are_left_out() -> None:
    assert weight_errors(nn.Conv2d(3, 3, 1)) == {}
    assert weight_errors(models.build("cifar10/birealnet18")) == {}


def test_names_are_those_of_the_network() -> None:
    network = models.build("cifar10/resnet20_1w1a")
    assert list(weight_errors(network)) == [name for name, _ in binary_layers(network)]


@pytest.mark.some(3)
@pytest.mark.parametrize(
    "name",
    [
        *("cifar10/resnet20_1w1a", "cifar10/birealnet18", "cifar10/adabin_resnet20"),
        *("imagenet/bnext_tiny", "imagenet/reactnet_a", "imagenet/binaryvit_small"),
    ],
)
def test_the_bits_are_the_larger_values_of_stage_2(name: str) -> None:
    torch.manual_seed(0)
    network = models.build(name, stage=1)
    layers = dict(binary_layers(network))
    noted = {name: layer.weight_bits() for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.stage = 2
        weight = layer.quantized_weight().detach()
        dims = tuple(range(1, weight.dim()))
        middle = (weight.amax(dims, keepdim=True) + weight.amin(dims, keepdim=True)) / 2
        assert torch.equal(weight > middle, noted[name])
        assert torch.equal(layer.weight_bits(), noted[name])
