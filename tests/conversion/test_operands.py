"""Operands: binary values after operators that move, join or combine binary values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.conversion import convert, verify
from tests.conversion.comparison import (
    Functional,
    assert_exact,
    assert_packed_exactly,
    images_of,
    packed,
)
from tests.conversion.foreign_models import LearnableBias, QConv, QLinear, seeded, where_ge


def conv(*args: Any, **kwargs: Any) -> QConv:
    return QConv(*args, **{"sign": lambda x: x, **kwargs})


EXACT: dict[str, tuple[tuple[int, ...], dict[str, Callable[[], nn.Module]], Any]] = {
    "flipped and rolled signs": (
        (6, 5, 7),
        {"c": lambda: conv(6, 8, 3)},
        lambda s, x: s.c(torch.sign(x).flip(3).roll((1, 2), (1, 2))),
    ),
    "signs of channels by index": (
        (6, 5, 5),
        {"c": lambda: conv(6, 8, 3)},
        lambda s, x: s.c(torch.sign(x)[:, torch.tensor([5, 0, 3, 3, 1, 2])]),
    ),
    "pixel shuffle of signs": (
        (8, 4, 4),
        {"c": lambda: conv(2, 8, 3)},
        lambda s, x: s.c(F.pixel_shuffle(torch.sign(x), 2)),
    ),
    "nearest neighbours of signs": (
        (6, 4, 4),
        {"c": lambda: conv(6, 8, 3)},
        lambda s, x: s.c(F.interpolate(torch.sign(x), scale_factor=2)),
    ),
    "reflected signs": (
        (6, 5, 5),
        {"c": lambda: conv(6, 8, 3, padding=1, padding_mode="reflect")},
        lambda s, x: s.c(torch.sign(x)),
    ),
    "replicated signs": (
        (6, 5, 5),
        {"c": lambda: conv(6, 8, 3)},
        lambda s, x: s.c(F.pad(torch.sign(x), (0, 2, 1, 0), mode="replicate")),
    ),
    "signs around a torus": (
        (6, 5, 6),
        {"c": lambda: conv(6, 8, 3)},
        lambda s, x: s.c(F.pad(torch.sign(x), (1, 2, 0, 3), mode="circular")),
    ),
    "moves of signs with thresholds of their own": (
        (6, 5, 5),
        {"m": lambda: LearnableBias(6), "c": lambda: conv(6, 8, 3)},
        lambda s, x: s.c(where_ge(s.m(x)).flip(1)),
    ),
    "half of the channels of signs": (
        (6, 5, 5),
        {"c": lambda: conv(3, 8, 3), "d": lambda: conv(3, 8, 3)},
        lambda s, x: (lambda a, b: s.c(a) - s.d(b))(*torch.sign(x).chunk(2, 1)),
    ),
    "max pool of signs that fills its last window": (
        (6, 6, 6),
        {"c": lambda: conv(6, 8, 3, padding=1)},
        lambda s, x: s.c(F.max_pool2d(torch.sign(x), 3, 2, ceil_mode=True)),
    ),
    "product of two signs": (
        (6, 5, 5),
        {"c": lambda: conv(6, 8, 3)},
        lambda s, x: s.c(where_ge(x) * where_ge(x.roll(1, 1))),
    ),
    "signs stacked": (
        (3, 5, 5),
        {"c": lambda: conv(6, 8, 3)},
        lambda s, x: s.c(torch.stack([where_ge(x), where_ge(x - 1)], 2).flatten(1, 2)),
    ),
    "columns of signs": (
        (4, 6, 6),
        {"a": lambda: QLinear(36, 5, sign=None)},
        lambda s, x: s.a(F.unfold(where_ge(x), 3).transpose(1, 2)),
    ),
    "a rank among channels": (
        (6, 5, 5),
        {"c": lambda: conv(6, 8, 3)},
        lambda s, x: s.c(torch.where(x.argsort(1).argsort(1) >= 3, 1.0, -1.0)),
    ),
    "sign after a ReLU": (
        (6, 5, 5),
        {"c": lambda: QConv(6, 8, 3, padding=1)},
        lambda s, x: s.c(F.relu(x)),
    ),
    "sign after a ReLU and a pool, linear": (
        (6, 4, 4),
        {"a": lambda: QLinear(24, 5)},
        lambda s, x: s.a(F.max_pool2d(F.relu(x), 2).flatten(1)),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    assert_packed_exactly(*EXACT[name])


def test_signs_of_a_vector_without_a_batch() -> None:
    model = seeded(
        lambda: Functional(lambda s, x: s.a(x.mean((0, 2, 3))), a=QLinear(6, 5, sign=where_ge))
    )
    engine = convert(model, images_of((6, 5, 5)))
    assert engine.report.packed == 1
    assert verify(engine, model, images_of((6, 5, 5))).ok


FLOAT: dict[str, tuple[Callable[..., Tensor], str]] = {
    "zeros around columns": (
        lambda s, x: s.a(F.unfold(where_ge(x), 3, padding=1).transpose(1, 2)),
        "takes the values -1, 0, 1",
    ),
    "sum of two signs": (
        lambda s, x: s.c(where_ge(x) + where_ge(x.roll(1, 1))),
        "takes the values -2, 0, 2",
    ),
    "signs and zeros": (
        lambda s, x: s.c(torch.cat([where_ge(x[:, :2]), torch.zeros_like(x[:, :2])], 1)),
        "takes the values -1, 0, 1",
    ),
    "a sign of integers that can be 0": (
        lambda s, x: s.c(torch.sign((x * 4).int()).float()),
        "-1, 0",
    ),
}


@pytest.mark.parametrize("name", FLOAT)
def test_what_takes_three_values_stays_float_with_that_reason(name: str) -> None:
    run, reason = FLOAT[name]
    model = seeded(lambda: Functional(run, a=QLinear(36, 5, sign=None), c=conv(4, 8, 3)))
    images = images_of((4, 6, 6))
    engine = convert(model, images, unconverted="ignore")
    assert not packed(engine)
    assert reason in engine.report.layers[0].reason
    assert_exact(engine, model, images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_integer_inputs_are_packed(dtype: torch.dtype) -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        return self.c(torch.where(x > 127, 1.0, -1.0) if dtype != torch.bool else x.float() * 2 - 1)

    model = seeded(lambda: Functional(run, c=conv(2, 5, 3, padding=1)))
    images = (images_of((2, 6, 6)) * 60 + 127).clamp(0, 255)
    images = images > 127 if dtype == torch.bool else images.to(dtype)
    engine = convert(model, images[:2])
    assert packed(engine) == ["c"]
    assert torch.equal(engine(images), model(images))
