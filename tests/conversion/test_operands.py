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
    assert_packed_exactly,
    images_of,
    packed,
)
from tests.conversion.foreign_models import (
    LearnableBias,
    QConv,
    QLinear,
    seeded,
    where_ge,
)


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
    "zeros around columns": (
        (4, 6, 6),
        {"a": lambda: QLinear(36, 5, sign=None)},
        lambda s, x: s.a(F.unfold(where_ge(x), 3, padding=1).transpose(1, 2)),
    ),
    "sum of two signs": (
        (6, 5, 5),
        {"c": lambda: conv(6, 8, 3, padding=1, stride=2)},
        lambda s, x: s.c(where_ge(x) + where_ge(x.roll(1, 1))),
    ),
    "signs and zeros": (
        (4, 6, 6),
        {"c": lambda: conv(4, 8, 3)},
        lambda s, x: s.c(torch.cat([where_ge(x[:, :2]), torch.zeros_like(x[:, :2])], 1)),
    ),
    "signs and channels of zeros around them": (
        (4, 6, 6),
        {"c": lambda: QConv(4, 8, 3)},
        lambda s, x: s.c(F.pad(x[:, :2], (0, 0, 0, 0, 1, 1))),
    ),
    "a sign of integers that can be 0": (
        (4, 6, 6),
        {"c": lambda: conv(4, 8, 3)},
        lambda s, x: s.c(torch.sign((x * 4).int()).float()),
    ),
    "a sign that is often 0": (
        (64, 6, 6),
        {"c": lambda: QConv(64, 8, 3, padding=1, groups=2), "d": lambda: QConv(64, 8, 3)},
        lambda s, x: s.d(F.softshrink(x, 0.5)) + s.c(F.hardshrink(-x, 0.5))[:, :, 1:-1, 1:-1],
    ),
    "three levels, linear, in a ternary weight": (
        (40,),
        {"a": lambda: nn.Linear(40, 9)},
        lambda s, x: F.linear(F.hardtanh(x.round()), torch.round(s.a.weight * 8).clamp(-1, 1)),
    ),
    "three levels by two thresholds": (
        (6, 7, 7),
        {"c": lambda: conv(6, 8, 3, padding=2, dilation=2)},
        lambda s, x: s.c(torch.where(x > 0.3, 2.0, torch.where(x < -0.5, -1.0, 0.5))),
    ),
    "activations of two bits": (
        (6, 7, 7),
        {"c": lambda: conv(6, 8, 3, padding=1), "d": lambda: conv(8, 4, 1)},
        lambda s, x: s.d(torch.round(s.c(torch.round(x.clamp(0, 3))).clamp(-2, 1))),
    ),
    "two signs with weights of their own": (
        (6, 7, 7),
        {"c": lambda: conv(6, 8, 3, padding=1)},
        lambda s, x: s.c(0.75 * where_ge(x - 0.25) + 0.25 * where_ge(x + 0.25)),
    ),
    "pooled levels": (
        (6, 8, 8),
        {"c": lambda: conv(6, 8, 3)},
        lambda s, x: s.c(F.max_pool2d(torch.round(x.clamp(-1, 1)), 2)),
    ),
    "levels with thresholds of their own, shuffled and rolled": (
        (6, 5, 5),
        {"m": lambda: LearnableBias(6), "c": lambda: conv(6, 8, 3)},
        lambda s, x: s.c(torch.round(s.m(x).clamp(-1, 1)).flip(1).roll(1, 2)),
    ),
    "signs with thresholds of their own, as rows": (
        (6, 5, 4),
        {"m": lambda: LearnableBias(6), "a": lambda: QLinear(6, 5, sign=None)},
        lambda s, x: s.a(where_ge(s.m(x)).flatten(2).transpose(1, 2)),
    ),
    "signs of channels after the signs of others": (
        (6, 5, 5),
        {"m": lambda: LearnableBias(6), "c": lambda: conv(12, 8, 3)},
        lambda s, x: s.c(torch.cat([where_ge(s.m(x)), where_ge(s.m(x)).flip(2)], 1)),
    ),
    "signs with thresholds of their own in a frame of -1": (
        (6, 5, 5),
        {"m": lambda: LearnableBias(6), "c": lambda: conv(6, 8, 3)},
        lambda s, x: s.c(F.pad(where_ge(s.m(x)), (1, 2, 0, 1), value=-1.0)),
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


@pytest.mark.some(3)
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
