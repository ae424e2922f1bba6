"""Weights that are NaN or infinite, and inputs from which a model computes NaN."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.conversion import convert, verify
from biper_engine.errors import ConversionError
from tests.conversion.comparison import images_of
from tests.conversion.foreign_models import PlainNet, seeded


class Logarithm(nn.Module):
    """Takes the logarithm of its images, before a binary network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PlainNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.log(x))


class Masked(nn.Module):
    """Adds a mask of -inf before a softmax, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PlainNet()
        self.register_buffer("mask", torch.tensor([0.0, -math.inf] * 16)[:8])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.softmax(x + self.mask, -1))


@pytest.mark.some(1)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_of_float_layers_that_are_not_finite_are_refused_by_name(value: float) -> None:
    model = seeded(PlainNet)
    name, weight = next(
        (name, p) for name, p in model.named_parameters() if "stem" in name or p.dim() > 1
    )
    weight.data.view(-1)[1] = value
    with pytest.raises(ConversionError, match=rf"NaN or infinite in 1 of \d+ values \({name}\)"):
        convert(model, images_of((3, 8, 8)))


def test_nan_in_a_batch_norm_is_refused_by_name() -> None:
    model = seeded(PlainNet)
    name, norm = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_var[2] = math.nan
    with pytest.raises(ConversionError, match=f"{name}.running_var"):
        convert(model, images_of((3, 8, 8)))


def test_an_infinite_constant_that_nothing_is_multiplied_by_is_a_number() -> None:
    model = seeded(Masked)
    convert(model, images_of((3, 8, 8)))  # which verifies it


def test_random_images_that_give_nan_are_replaced_by_those_of_the_example() -> None:
    model = seeded(Logarithm)
    images = torch.rand(2, 3, 8, 8) + 0.1
    convert(model, images)  # which verifies it


@pytest.mark.some(1)
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_images_that_give_nan_are_refused_in_one_sentence(value: float) -> None:
    model = seeded(Logarithm)
    wrong = torch.full((2, 3, 8, 8), value)
    with pytest.raises(ConversionError, match="sign of NaN before net") as caught:
        convert(model, wrong)
    assert "\n" not in str(caught.value)
    engine = convert(model, wrong, check=False)
    with pytest.raises(ConversionError, match="sign of NaN before net"):
        verify(engine, model, wrong)
