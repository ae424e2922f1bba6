"""Merge: convolutions of the same bits whose results are concatenated become one."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.conversion.comparison import Functional, assert_close, converted, packed
from tests.conversion.foreign_models import LearnableBias, QConv
from tests.conversion.test_fuse import operators


def layers(channels: int) -> dict[str, nn.Module]:
    return {
        "a": QConv(channels, channels, 1),
        "b": QConv(channels, channels, 1),
        "norm_a": nn.BatchNorm2d(channels),
        "norm_b": nn.BatchNorm2d(channels),
        "alpha": LearnableBias(2 * channels),
        "prelu": nn.PReLU(2 * channels, init=0.3),
        "beta": LearnableBias(2 * channels),
        "c": QConv(2 * channels, 4, 3),
        "other": QConv(channels, channels, 3),
    }


def halves(s: Any, x: torch.Tensor) -> list[torch.Tensor]:
    return [s.norm_a(s.a(x)), s.norm_b(s.b(x))]


def behind(s: Any, joined: torch.Tensor) -> torch.Tensor:
    y = s.beta(s.prelu(s.alpha(joined)))
    return s.c(y) + F.avg_pool2d(y, 3, 1)[:, :4]


MERGED = ["binarize", "bconv2d_float_bits", "avg_pool2d", "bconv2d_float"]


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        (lambda s, x: behind(s, torch.cat(halves(s, x), 1)), MERGED),
        (lambda s, x: behind(s, torch.cat([h + x for h in halves(s, x)], 1)), ["cat", *MERGED]),
        (
            lambda s, x: behind(
                s, torch.cat([(h := halves(s, x))[0] + x, h[1] + x.flip(2)], 1)
            ),
            ["cat", "flip", *MERGED],
        ),
        (lambda s, x: behind(s, torch.cat([(h := halves(s, x))[0] + x, h[1]], 1)), None),
        (lambda s, x: behind(s, torch.cat([s.a(x), s.b(x + 0.1)], 1)), None),
        (lambda s, x: behind(s, torch.cat([s.a(x), s.a(x) * 2], 1)), None),
        (lambda s, x: torch.cat([y := s.a(x), s.b(x)], 1).mean(1) + y.mean(1), None),
        (lambda s, x: torch.cat(halves(s, x), 2), None),
        (lambda s, x: torch.cat([F.relu(s.a(x)), s.b(x)], 1), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("channels", [6, 32])
def test_merged_convolutions_mean_what_the_model_means(
    run: Any, wanted: list[str] | None, channels: int
) -> None:
    engine, model, images = converted(lambda: Functional(run, **layers(channels)), (channels, 9, 9))
    assert_close(engine, model, images)
    if wanted is not None:
        found = [name for name in operators(engine) if name not in ("slice.Tensor", "add.Tensor")]
        assert sorted(found) == sorted(wanted)
        assert {"a", "b", "c"} <= set(packed(engine))
