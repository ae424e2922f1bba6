"""Scales of inputs, as `sign(x) * mean|x|`: they multiply the sum, if all of it has the same."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.conversion import convert
from biper_engine.errors import UnconvertedWarning
from tests.conversion.comparison import Functional, assert_close, images_of, packed
from tests.conversion.foreign_models import QConv, QLinear, seeded, where_ge


def conv(*args: Any, **kwargs: Any) -> QConv:
    return QConv(*args, **{"sign": lambda x: x, "bias": True, **kwargs})


def linear(*args: Any) -> QLinear:
    return QLinear(*args, sign=None)


def per_sample(x: Tensor) -> Tensor:
    return x.abs().mean((1, 2, 3), keepdim=True)


def per_position(x: Tensor) -> Tensor:
    return x.abs().mean(1, keepdim=True)


def per_row(x: Tensor) -> Tensor:
    return x.abs().mean(-1, keepdim=True)


SCALED: dict[str, tuple[tuple[int, ...], nn.Module | Any, Any]] = {
    "a sample": (
        (6, 7, 8),
        lambda: conv(6, 5, 3, padding=1),
        lambda x: where_ge(x) * per_sample(x),
    ),
    "the scale first": ((6, 7, 8), lambda: conv(6, 5, 3), lambda x: per_sample(x) * where_ge(x)),
    "divided": (
        (64, 7, 8),
        lambda: conv(64, 5, 3, stride=2, groups=1),
        lambda x: where_ge(x) / (per_sample(x) + 1),
    ),
    "groups": (
        (64, 7, 8),
        lambda: conv(64, 6, 3, groups=2, padding=2, dilation=2),
        lambda x: where_ge(x) * per_sample(x),
    ),
    "two scales": (
        (6, 7, 8),
        lambda: conv(6, 5, 3),
        lambda x: (where_ge(x) * per_sample(x)) * 0.5 / per_sample(x + 1),
    ),
    "zeros and ones": (
        (6, 7, 8),
        lambda: conv(6, 5, 3, padding=1),
        lambda x: (x > 0).float() * per_sample(x),
    ),
    "padded": (
        (6, 7, 8),
        lambda: conv(6, 5, 3),
        lambda x: F.pad(where_ge(x) * per_sample(x), (1, 2, 0, 1)),
    ),
    "three levels": (
        (6, 7, 8),
        lambda: conv(6, 5, 3, padding=1),
        lambda x: torch.sign(x.round()) * per_sample(x),
    ),
    "positions of a pointwise layer": (
        (6, 7, 8),
        lambda: conv(6, 5, 1),
        lambda x: where_ge(x) * per_position(x),
    ),
    "positions of a strided pointwise layer": (
        (6, 7, 8),
        lambda: conv(6, 5, 1, stride=(2, 3)),
        lambda x: where_ge(x) * per_position(x),
    ),
    "rows": ((33,), lambda: linear(33, 5), lambda x: where_ge(x) * per_row(x)),
    "tokens": ((7, 33), lambda: linear(33, 5), lambda x: where_ge(x) * per_row(x)),
    "samples of tokens": (
        (7, 33),
        lambda: linear(33, 5),
        lambda x: where_ge(x) * x.abs().mean((1, 2), keepdim=True),
    ),
    "a choice of a scale and its negative": (
        (6, 7, 8),
        lambda: conv(6, 5, 3),
        lambda x: torch.where(x < 0.25, -per_sample(x), per_sample(x)),
    ),
    "flattened": (
        (6, 4, 3),
        lambda: linear(72, 5),
        lambda x: (per_sample(x) * where_ge(x)).flatten(1),
    ),
    "turned and padded": (
        (6, 4, 3),
        lambda: linear(6, 5),
        lambda x: F.pad(where_ge(x) / per_sample(x), (1, 1)).flatten(2).transpose(1, 2),
    ),
    "thresholds of channels": (
        (6, 7, 8),
        lambda: conv(6, 5, 3),
        lambda x: where_ge(x - torch.linspace(-1, 1, 6).view(-1, 1, 1)) * per_sample(x),
    ),
}


@pytest.mark.some(4)
@pytest.mark.parametrize("name", SCALED)
def test_scale(name: str) -> None:
    shape, layer, run = SCALED[name]
    model = seeded(lambda: Functional(lambda s, x: s.c(run(x)), c=layer()))
    engine = convert(model, images_of(shape))  # which verifies it
    assert packed(engine) == ["c"]
    for count in (1, 3, 5):
        assert_close(engine, model, images_of(shape, count))


def test_scale_of_a_one_dimensional_layer() -> None:
    model = seeded(
        lambda: Functional(
            lambda s, x: F.conv1d(
                where_ge(x) * x.abs().mean((1, 2), keepdim=True), where_ge(s.c.weight), padding=1
            ),
            c=nn.Conv1d(6, 5, 3),
        )
    )
    engine = convert(model, images_of((6, 9)))
    assert engine.report.packed == 1
    assert_close(engine, model, images_of((6, 9), 5, seed=9))


FLOAT = {
    "positions in a window": (lambda: conv(6, 5, 3), lambda x: where_ge(x) * per_position(x)),
    "positions in a padded layer": (
        lambda: conv(6, 5, 1, padding=1),
        lambda x: where_ge(x) * per_position(x),
    ),
    "channels": (
        lambda: conv(6, 5, 1),
        lambda x: where_ge(x) * x.abs().mean((2, 3), keepdim=True),
    ),
}


@pytest.mark.some(2)
@pytest.mark.parametrize("name", FLOAT)
def test_a_scale_that_differs_in_a_sum_stays_float(name: str) -> None:
    layer, run = FLOAT[name]
    model = seeded(
        lambda: Functional(lambda s, x: s.c(run(x)) + s.d(x).mean(), c=layer(), d=QConv(6, 4, 3))
    )
    with pytest.warns(UnconvertedWarning, match="differs among the values that an output sums up"):
        engine = convert(model, images_of((6, 7, 8)))
    assert packed(engine) == ["d"]


@pytest.mark.some(1)
@pytest.mark.parametrize("dims", [(1, 2, 3), (2, 3), (1,)])
def test_signs_centred_by_a_mean_of_the_input(dims: tuple[int, ...]) -> None:
    model = seeded(
        lambda: Functional(
            lambda s, x: s.c(torch.sign(x - x.mean(dims, keepdim=True))), c=conv(6, 5, 3, padding=1)
        )
    )
    engine = convert(model, images_of((6, 7, 8)))
    assert packed(engine) == ["c"]
