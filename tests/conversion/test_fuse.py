"""Fuse: operators after a binary convolution become its epilogue, with the same results."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from biper_engine.conversion import convert
from biper_engine.engine import Engine
from tests.conversion.comparison import Functional, assert_close, converted, images_of
from tests.conversion.foreign_models import LearnableBias, QConv, QLinear


def operators(engine: Engine) -> list[str]:
    """The operators of an engine, without constants and selections."""
    return [
        str(node.target).removesuffix(".default").removeprefix("biper.").removeprefix("aten.")
        for node in engine.graph_module.graph.nodes
        if node.op == "call_function" and "getitem" not in str(node.target)
    ]


def layers() -> dict[str, nn.Module]:
    return {
        "c": QConv(6, 8, 3, padding=1),
        "norm": nn.BatchNorm2d(8),
        "alpha": LearnableBias(8),
        "beta": LearnableBias(8),
        "prelu": nn.PReLU(8, init=-0.4),
        "d": QConv(8, 5, 3),
        "e": QConv(6, 8, 3, padding=1),
    }


POOL_BEHIND = ["clamp", "max_pool2d"]
BITS = ["binarize", "bconv2d_bits", "bconv2d_float"]


@pytest.mark.some(4)
@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        (lambda s, x: s.d(s.norm(s.c(x))), BITS),
        (lambda s, x: s.d(F.hardtanh(s.norm(s.c(x)))), BITS),
        (lambda s, x: s.d(F.hardtanh(s.norm(s.c(x) * s.alpha.bias), inplace=True)), BITS),
        (lambda s, x: s.d(s.norm(F.max_pool2d(s.c(x) * s.alpha.bias, 2))), BITS),
        (lambda s, x: s.d(F.max_pool2d(F.hardtanh(s.norm(s.c(x))), 3, 2, 1)), BITS),
        (lambda s, x: s.d(F.hardtanh(s.norm(F.max_pool2d(s.c(x), 2)))), BITS),
        (lambda s, x: s.d(F.relu(s.norm(s.c(x))) - 0.5), BITS),
        (lambda s, x: s.d(F.relu6(s.norm(s.c(x))) - 0.5), BITS),
        (lambda s, x: s.d(s.beta(s.prelu(s.alpha(s.norm(s.c(x)))))), BITS),
        (lambda s, x: s.d(s.norm(1.5 - s.c(x))), BITS),
        (lambda s, x: s.d(-(s.c(x) / s.alpha.bias) + 0.1), BITS),
        (lambda s, x: s.d(F.leaky_relu(s.norm(s.c(x)), 0.1) + 0.25), BITS),
        (lambda s, x: s.d(s.norm(s.c(x)) + x.repeat(1, 2, 1, 1)[:, :8]), None),
        (lambda s, x: s.d(F.hardtanh(s.norm(s.c(x)) + s.norm(s.e(x)))), None),
        (lambda s, x: s.d(F.max_pool2d(s.prelu(s.norm(s.c(x))), 2)), None),
        (lambda s, x: s.d(F.max_pool2d(s.norm(s.c(x)), 2, ceil_mode=True)), None),
        (lambda s, x: s.d(F.max_pool2d(s.norm(F.max_pool2d(s.c(x), 2)), 2, 1)), None),
        (lambda s, x: s.d(s.prelu(F.hardtanh(s.norm(s.c(x)))) + 0.1), None),
        (lambda s, x: s.d((lambda y: y * y - 3.3)(s.c(x))), None),
        (lambda s, x: s.d(s.c(x) + s.c(x).mean((1, 2, 3), keepdim=True) + 0.1), None),
        (lambda s, x: s.d(torch.add(s.c(x), s.e(x), alpha=0.5) + 0.25), None),
        (lambda s, x: s.d(torch.sub(1.0, s.c(x), alpha=2)), None),
        (lambda s, x: (lambda y: s.d(y) + y[:, :5, 1:-1, 1:-1])(F.hardtanh(s.norm(s.c(x)))), None),
    ],
)  # fmt: skip
def test_an_epilogue_means_what_the_model_means(run: Any, wanted: list[str] | None) -> None:
    engine, model, images = converted(lambda: Functional(run, **layers()), (6, 8, 8))
    assert_close(engine, model, images)
    if wanted is not None:
        assert operators(engine) == wanted


@pytest.mark.parametrize("limits", [(math.inf, None), (None, -math.inf)])
def test_an_infinite_limit_that_leaves_no_other_value_is_kept(limits: Any) -> None:
    model = Functional(lambda s, x: s.c(x).clamp(*limits), **layers())
    engine = convert(model, images_of((6, 8, 8)))
    wanted = torch.full((4, 8, 8, 8), next(x for x in limits if x is not None))
    assert torch.equal(engine(images_of((6, 8, 8))), wanted)


@pytest.mark.some(1)
@pytest.mark.parametrize("value", [0.0, 1e-8, -1.0])
def test_zero_and_negative_scales(value: float) -> None:
    def build() -> nn.Module:
        model = Functional(
            lambda s, x: s.d(s.norm(F.max_pool2d(s.c(x) * s.alpha.bias, 2))), **layers()
        )
        with torch.no_grad():
            model.alpha.bias[0, ::2] = value
        return model

    engine, model, images = converted(build, (6, 8, 8))
    assert operators(engine) == BITS
    assert_close(engine, model, images)
    with torch.no_grad():
        model.norm.weight[1::2] = value
    engine, _, _ = converted(lambda: model, (6, 8, 8))
    assert_close(engine, model, images)


def test_a_residual_joins_the_epilogue() -> None:
    def run(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(self.c(x))
        out += F.pad(x, (0, 0, 0, 0, 1, 1))
        return self.d(F.hardtanh(out, inplace=True))

    engine, model, images = converted(lambda: Functional(run, **layers()), (6, 8, 8))
    assert sorted(operators(engine)) == sorted(["constant_pad_nd", *BITS])
    assert_close(engine, model, images)


def test_batch_norm_folds_into_float_layers() -> None:
    def run(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = self.c(self.norm0(self.stem(x)))
        return self.fc(self.norm1(F.adaptive_avg_pool2d(x, 1).flatten(1)))

    engine, model, images = converted(
        lambda: Functional(
            run,
            stem=nn.Conv2d(3, 6, 3, groups=3),
            norm0=nn.BatchNorm2d(6),
            c=QConv(6, 8, 3),
            norm1=nn.BatchNorm1d(8),
            fc=nn.Linear(8, 4),
        ),
        (3, 8, 8),
    )
    assert not any("norm" in name for name in operators(engine))
    assert_close(engine, model, images)


@pytest.mark.some(1)
@pytest.mark.parametrize("tokens", [5, 4])
def test_a_norm_over_tokens_is_not_folded_into_a_linear_layer(tokens: int) -> None:
    """BatchNorm1d of [N, T, C] normalises T; T == C must not make it one of the outputs."""
    engine, model, images = converted(
        lambda: Functional(
            lambda s, x: s.b(s.norm(s.fc(s.a(x)))),
            a=QLinear(6, 6),
            fc=nn.Linear(6, 4),
            norm=nn.BatchNorm1d(tokens),
            b=QLinear(4, 3),
        ),
        (tokens, 6),
    )
    assert_close(engine, model, images)


@pytest.mark.some(2)
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.GroupNorm(2, 8),
        lambda: nn.InstanceNorm2d(8),
        lambda: nn.BatchNorm2d(8, track_running_stats=False),
        lambda: nn.LayerNorm((8, 8, 8)),
    ],
)
def test_norms_by_statistics_of_the_input_stay_float(norm: Any) -> None:
    engine, model, _images = converted(
        lambda: Functional(
            lambda s, x: s.d(s.norm(s.c(x)) + 0.011), c=layers()["c"], norm=norm(), d=layers()["d"]
        ),
        (6, 8, 8),
    )
    assert engine.report.packed == 2
    assert_close(engine, model, images_of((6, 8, 8), 4))


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        (lambda s, x: F.max_pool2d(F.hardtanh(x * 3), 3, 2, 1), ["max_pool2d", "hardtanh"]),
        (lambda s, x: F.max_pool2d(F.relu(x), 2, ceil_mode=True), ["max_pool2d", "relu"]),
        (lambda s, x: (lambda y: F.max_pool2d(y, 2) + y.mean())(x.clamp(-1, 2)), POOL_BEHIND),
    ],
)  # fmt: skip
def test_a_clamp_of_floats_comes_after_the_max_pool_behind_it(run: Any, wanted: list[str]) -> None:
    def whole(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return s.c(x).mean((2, 3))[:, :6, None, None] + run(s, x)

    engine, model, images = converted(lambda: Functional(whole, **layers()), (6, 9, 9))
    assert_close(engine, model, images)
    moved = [
        name for name in operators(engine) if name in ("max_pool2d", "hardtanh", "relu", "clamp")
    ]
    assert moved == wanted


@pytest.mark.parametrize("scaled", [lambda s, y: y * s.alpha.bias, lambda s, y: s.alpha.bias * y])
def test_a_scale_and_batch_norm_are_folded_into_the_float_layer_in_front(scaled: Any) -> None:
    def run(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return s.c(s.norm(scaled(s, s.stem(x))))

    def build() -> nn.Module:
        parts = {**layers(), "c": QConv(8, 5, 3), "stem": nn.Conv2d(6, 8, 3)}
        return Functional(run, **parts)

    engine, model, images = converted(build, (6, 9, 9))
    assert_close(engine, model, images)
    assert operators(engine) == ["conv2d", "binarize", "bconv2d_float"]
