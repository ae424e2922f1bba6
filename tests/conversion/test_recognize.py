"""Recognize: which layers become binary, exactly, for any operators around sign and convolution."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.conversion import convert
from biper_engine.conversion.cones import Cone
from biper_engine.conversion.pipeline import build
from biper_engine.errors import ConversionError, UnconvertedWarning
from tests.conversion.comparison import (
    Functional,
    assert_close,
    assert_exact,
    assert_packed_exactly,
    convert_quietly,
    converted,
    images_of,
    packed,
)
from tests.conversion.foreign_models import (
    SIGNS,
    WEIGHTS,
    LearnableBias,
    Probe,
    QConv,
    QLinear,
    lived_in,
    seeded,
    shifted_weight,
    where_ge,
    zero_one_weight,
)


def zero_one(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def ternary_weight(weight: Tensor) -> Tensor:
    kept = weight.abs() > weight.abs().median()
    return torch.where(kept, torch.sign(weight), 0.0)


def identity(x: Tensor) -> Tensor:
    return x


def conv(*args: Any, **kwargs: Any) -> QConv:
    return QConv(*args, **{"sign": identity, **kwargs})


TIES = {
    "sign",
    "function",
    "data_assignment",
    "data_in_place",
    "straight_through",
    "bireal",
    "copysign",
}


@pytest.mark.some(5)
@pytest.mark.parametrize("name", SIGNS)
def test_every_spelling_of_sign_is_exact_also_at_zero(name: str) -> None:
    model = seeded(lambda: Probe(SIGNS[name]))
    images = images_of((5, 6, 6))
    images[images.abs() < 0.2] = 0
    engine = convert_quietly(model, images[:2])
    assert packed(engine) == ["conv"]
    if name in TIES:  # a bit has no third value: the contract takes 0 as +1
        reference = seeded(lambda: Probe(where_ge))
        reference.load_state_dict(model.state_dict())
        assert_exact(engine, reference, images)
        images = torch.where(images == 0, 0.5, images)
    assert_exact(engine, model, images)


@pytest.mark.some(4)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_way_to_binarise_weights_is_packed(name: str) -> None:
    engine, model, images = converted(lambda: Probe(torch.sign, binarize=WEIGHTS[name]), (5, 6, 6))
    assert packed(engine) == ["conv"]
    assert_close(engine, model, images)


EXACT: dict[str, tuple[tuple[int, ...], dict[str, Callable[[], nn.Module]], Any]] = {
    "zero pad after sign": (
        (4, 6, 6),
        {"c": lambda: conv(4, 5, 3)},
        lambda s, x: s.c(F.pad(torch.sign(x), (0, 2, 1, 0))),
    ),
    "zero pad before sign": (
        (4, 6, 6),
        {"c": lambda: QConv(4, 5, 3)},
        lambda s, x: s.c(F.hardtanh(F.pad(x, (0, 2, 1, 0)))),
    ),
    "zero pad before a sign without zero": (
        (4, 6, 6),
        {"c": lambda: QConv(4, 5, 3, sign=where_ge)},
        lambda s, x: s.c(F.pad(x, (1, 1, 1, 1))),
    ),
    "one pad": (
        (4, 6, 6),
        {"c": lambda: conv(4, 5, 3, padding=1)},
        lambda s, x: s.c(F.pad(torch.sign(x), (1, 1, 1, 1), value=1.0)),
    ),
    "minus one pad": (
        (4, 6, 6),
        {"c": lambda: conv(4, 5, 3)},
        lambda s, x: s.c(F.pad(torch.sign(-x), (1, 1, 1, 1), value=-1.0)),
    ),
    "groups, stride, dilation": (
        (48, 9, 8),
        {"c": lambda: QConv(48, 6, 3, padding=2, groups=3, stride=(2, 1), dilation=(1, 2))},
        lambda s, x: s.c(x),
    ),
    "groups of a channel more than a byte": (
        (18, 9, 7),
        {"c": lambda: QConv(18, 12, (3, 2), padding=(0, 1), groups=2)},
        lambda s, x: s.c(x),
    ),
    "even kernel, same padding": (
        (5, 6, 6),
        {"c": lambda: QConv(5, 3, 4, padding="same")},
        lambda s, x: s.c(x),
    ),
    "channels beyond a word": (
        (65, 4, 4),
        {"c": lambda: QConv(65, 33, 3, padding=1)},
        lambda s, x: s.c(x),
    ),
    "a single channel": (
        (1, 5, 5),
        {"c": lambda: QConv(1, 1, 3), "d": lambda: QConv(1, 1, 1)},
        lambda s, x: s.d(s.c(x) + 0.5),
    ),
    "max pool of signs": (
        (6, 9, 8),
        {"c": lambda: conv(6, 8, 3, padding=1)},
        lambda s, x: s.c(F.max_pool2d(torch.sign(x), 3, 2, 1)),
    ),
    "cat of signs": (
        (6, 5, 5),
        {"c": lambda: conv(9, 8, 3)},
        lambda s, x: s.c(torch.cat([torch.sign(x), torch.sign(x[:, :3] - 1)], 1)),
    ),
    "channel shuffle of signs": (
        (6, 5, 5),
        {"c": lambda: conv(6, 8, 3)},
        lambda s, x: s.c(
            torch.sign(x).view(x.size(0), 2, 3, 5, 5).transpose(1, 2).reshape(x.size(0), 6, 5, 5)
        ),
    ),
    "slices of signs": (
        (6, 8, 8),
        {"c": lambda: conv(3, 8, 3)},
        lambda s, x: s.c(torch.sign(x)[:, 1:4, ::2, ::2]),
    ),
    "two layers share one sign": (
        (6, 5, 5),
        {"c": lambda: conv(6, 8, 3), "d": lambda: conv(6, 4, 3)},
        lambda s, x: torch.cat([s.c(torch.sign(x)), s.d(torch.sign(x))], 1),
    ),
    "two thresholds on one convolution": (
        (6, 5, 5),
        {"c": lambda: QConv(6, 8, 3), "d": lambda: conv(8, 4, 3), "e": lambda: conv(8, 4, 3)},
        lambda s, x: (
            lambda y: s.d(torch.where(y > 1.5, 1.0, -1.0)) + s.e(torch.where(y > -2.5, 1.0, -1.0))
        )(s.c(x)),
    ),
    "zero and one": (
        (32, 7, 8),
        {"c": lambda: QConv(32, 4, 3, padding=1, groups=2, sign=zero_one)},
        lambda s, x: s.c(x),
    ),
    "zero and one, both": (
        (6, 7, 8),
        {"c": lambda: QConv(6, 4, 3, padding=1, stride=2, sign=zero_one, binarize=zero_one_weight)},
        lambda s, x: s.c(x),
    ),
    "zero and one by beta +- alpha, with a bias": (
        (6, 5, 5),
        {
            "c": lambda: QConv(
                6, 4, 3, padding=(2, 1), dilation=2, sign=zero_one, binarize=shifted_weight
            )
        },
        lambda s, x: s.c(x) + 0.5,
    ),
    "zero and one, linear": (
        (20,),
        {"a": lambda: QLinear(20, 33, sign=zero_one), "b": lambda: QLinear(33, 7)},
        lambda s, x: s.b(s.a(x) - 0.5),
    ),
    "levels half and two": (
        (6, 5, 5),
        {"c": lambda: conv(6, 4, 3, padding=1)},
        lambda s, x: s.c(torch.where(x > 0.25, 0.5, 2.0)),
    ),
    "linear over the last dimension": (
        (5, 16),
        {"a": lambda: QLinear(16, 6), "b": lambda: QLinear(6, 3)},
        lambda s, x: s.b(s.a(x) + 0.5),
    ),
    "linear on permuted channels": (
        (6, 5, 4),
        {"a": lambda: QLinear(6, 16, sign=None)},
        lambda s, x: s.a(torch.sign(x).permute(0, 2, 3, 1)),
    ),
    "matmul": (
        (9,),
        {"a": lambda: QLinear(9, 5)},
        lambda s, x: torch.sign(x) @ torch.sign(s.a.weight).t(),
    ),
    "sign, flatten, linear": (
        (3, 4, 4),
        {"a": lambda: QLinear(48, 5, sign=None)},
        lambda s, x: s.a(torch.sign(x).flatten(1)),
    ),
    "flatten, sign, linear": (
        (3, 4, 4),
        {"a": lambda: QLinear(48, 5, sign=None)},
        lambda s, x: s.a(torch.sign(x.view(-1, 48))),
    ),
    "the same module twice": (
        (8, 5, 5),
        {"c": lambda: QConv(8, 8, 3, padding=1)},
        lambda s, x: s.c(s.c(x) + 0.5),
    ),
    "learned thresholds": (
        (6, 5, 5),
        {"m": lambda: LearnableBias(6), "c": lambda: QConv(6, 8, 3, sign=where_ge)},
        lambda s, x: s.c(s.m(x)),
    ),
    "weights of three values": (
        (6, 5, 6),
        {"c": lambda: QConv(6, 8, 3, padding=1, binarize=ternary_weight)},
        lambda s, x: s.c(x),
    ),
    "weights of three values, groups": (
        (64, 5, 5),
        {"c": lambda: QConv(64, 4, 3, stride=2, groups=2, binarize=ternary_weight)},
        lambda s, x: s.c(x),
    ),
    "weights of three values, linear, on zero and one": (
        (20,),
        {"a": lambda: nn.Linear(20, 9)},
        lambda s, x: F.linear(zero_one(x), ternary_weight(s.a.weight)),
    ),
    "weights of three values, pooled, with a shortcut": (
        (8, 6, 6),
        {"c": lambda: QConv(8, 8, 3, padding=1, binarize=ternary_weight)},
        lambda s, x: F.max_pool2d(s.c(x), 2) + s.c(x)[:, :, ::2, ::2],
    ),
    "chunks of one convolution": (
        (6, 7, 7),
        {"c": lambda: QConv(6, 8, 3), "d": lambda: QConv(4, 4, 3), "e": lambda: QConv(4, 4, 3)},
        lambda s, x: (lambda a, b: s.d(a) + s.e(b))(*(s.c(x) - 0.5).chunk(2, 1)),
    ),
}


@pytest.mark.some(7)
@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    assert_packed_exactly(*EXACT[name])


def trained_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    lived_in(norm)
    return norm


def one_layer(run: Callable[..., Any], layer: nn.Module | None = None) -> nn.Module:
    """A model with one layer that can be packed and one, `c`, under test."""
    return seeded(lambda: Functional(run, ok=QConv(4, 4, 3), c=layer or QConv(4, 4, 3)))


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda s, x: s.ok(x) + F.conv2d(x, torch.sign(s.c.weight)), "the network's input"),
        (
            lambda s, x: s.ok(x) + F.conv2d(torch.sign(x), s.c.weight),
            "its input is a sign, but its weights are real",
        ),
        (
            lambda s, x: (
                s.ok(x)
                + F.conv2d(
                    torch.sign(x), torch.sign(s.c.weight) * s.c.weight.abs().mean(0, keepdim=True)
                )
            ),
            "distinct values",
        ),
        (
            lambda s, x: (
                s.ok(x) + F.conv2d(F.avg_pool2d(torch.sign(x), 3, 1, 1), torch.sign(s.c.weight))
            ),
            "an average pool",
        ),
    ],
)
def test_the_warning_names_float_layers_with_reason_and_cost(run: Any, reason: str) -> None:
    model, images = one_layer(run), images_of((4, 6, 6))
    with pytest.warns(UnconvertedWarning, match=r"1 binary layer.*of all MACs") as caught:
        engine = convert(model, images)
    assert caught[0].filename == __file__
    assert reason in str(caught[0].message)
    assert len(packed(engine)) == 1
    assert_close(engine, model, images)
    with pytest.raises(ConversionError, match=reason):
        convert(model, images, unconverted="raise")


def test_the_work_of_recognition_grows_with_the_layers_not_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluations = 0
    evaluate = Cone.__call__

    def counted(cone: Cone, x: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return evaluate(cone, x)

    monkeypatch.setattr(Cone, "__call__", counted)
    counts = []
    for depth in (3, 6):
        evaluations = 0
        layers = [QConv(4, 4, 3, padding=1, sign=where_ge) for _ in range(depth)]
        example = (images_of((4, 6, 6)),)
        build(nn.Sequential(*layers), example, keep_float=(), compute_dtype=torch.float32)
        counts.append(evaluations)
    assert counts[1] <= 2 * counts[0]


def test_a_trace_without_writes_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def repeated(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("biper_engine.conversion.capture.dispatch_functionalize", repeated)
    model = seeded(lambda: Functional(lambda s, x: F.relu(s.c(x)) + 1, c=QConv(4, 4, 3)))
    assert convert(model, images_of((4, 6, 6))).report.packed == 1


def test_a_pointwise_layer_on_one_channel_is_not_called_binary() -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        return self.conv(self.stem(x))

    engine = convert(
        seeded(lambda: Functional(run, stem=nn.Conv2d(1, 6, 1), conv=QConv(6, 4, 3))),
        images_of((1, 6, 6)),
    )
    assert packed(engine) == ["conv"]
    assert not engine.report.layers[0].binary


@pytest.mark.some(1)
@pytest.mark.parametrize("pattern", ["body.1", "body.*1", "*.1"])
def test_keep_float_takes_every_call_of_a_module(pattern: str) -> None:
    layers = nn.Sequential(QConv(4, 4, 1), QConv(4, 4, 1))
    model = seeded(
        lambda: Functional(lambda s, x: s.body[1](s.body[1](s.body[0](x) - 0.5) + 0.5), body=layers)
    )
    images = images_of((4, 5, 5))
    engine = convert(model, images, keep_float=[pattern], unconverted="raise")
    assert packed(engine) == ["body.0"]
    assert [row.reason for row in engine.report.layers[1:]] == ["kept by `keep_float`"] * 2
    assert_exact(engine, model, images)


def test_the_mean_of_two_packed_terms_is_fused_like_one() -> None:
    """BatchNorm, a shortcut, a clamp and the next sign are in the epilogues of both."""

    def run(self: nn.Module, x: Tensor) -> Tensor:
        return self.d(F.hardtanh(self.norm(self.c(x)) + x))

    engine, model, images = converted(
        lambda: Functional(
            run,
            c=QConv(8, 8, 3, padding=1, binarize=ternary_weight),
            norm=trained_norm(8),
            d=QConv(8, 4, 3, sign=where_ge),
        ),
        (8, 6, 6),
    )
    names = [str(n.target) for n in engine.graph_module.graph.nodes if n.op == "call_function"]
    assert [name.split(".")[1] for name in names] == [
        *("binarize", "bconv2d_float", "bconv2d_bits", "bconv2d_float")
    ]
    row = engine.report.layers[0]
    assert row.zero_weights == 8 * 8 * 9 // 2
    assert row.weight_bits_after == 2 * 32 * 8 * 9
    assert_close(engine, model, images)


def test_one_zero_costs_its_channel_no_rounding() -> None:
    model, images = seeded(lambda: Probe(torch.sign)), images_of((5, 6, 6))
    with torch.no_grad():
        model.conv.weight[1, 2, 0, 0] = 0
    engine = convert(model, images, unconverted="raise")
    assert engine.report.layers[0].zero_weights == 1
    assert_exact(engine, model, images)


@pytest.mark.parametrize("channels", [1, 2, 4, 8])
def test_grouped_layers_that_are_slower_on_bits_stay_float_without_a_warning(channels: int) -> None:
    model = seeded(
        lambda: Functional(lambda s, x: s.c(x), c=QConv(16, 16, 3, groups=16 // channels))
    )
    images = images_of((16, 6, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = convert(model, images, unconverted="raise")
    (row,) = engine.report.layers
    assert (row.packed, row.binary, row.by_choice) == (False, True, True)
    assert "times as fast in float on the cpu backend" in row.reason
    assert f"{channels} channel" in row.reason
    assert_exact(engine, model, images)


def test_a_float_layer_takes_its_signs_from_bits() -> None:
    engine, model, images = converted(
        lambda: Functional(
            lambda s, x: s.c(s.d(x) - 0.5),
            c=QConv(8, 8, 3, groups=8, sign=where_ge),
            d=QConv(4, 8, 1),
        ),
        (4, 6, 6),
    )
    names = [str(n.target) for n in engine.graph_module.graph.nodes if n.op == "call_function"]
    assert [name.split(".")[1] for name in names] == [
        *("binarize", "bconv2d_bits", "unbinarize", "conv2d")
    ]
    assert_exact(engine, model, images)


def test_groups_of_16_channels_run_on_bits() -> None:
    engine, model, images = converted(
        lambda: Functional(lambda s, x: s.c(x), c=QConv(32, 32, 3, groups=2)), (32, 6, 6)
    )
    assert packed(engine) == ["c"]
    assert_exact(engine, model, images)


def test_two_binary_layers_without_a_norm_between_have_ties() -> None:
    def layers(scale: float) -> nn.Module:
        def binarize(weight: Tensor) -> Tensor:
            return torch.sign(weight) * scale

        return Functional(
            lambda s, x: s.d(F.prelu(s.c(x), torch.tensor([0.25]))),
            c=QConv(4, 5, 3, binarize=binarize),
            d=QConv(5, 4, 3, sign=where_ge),
        )

    images = images_of((4, 6, 6))
    ties = [
        convert(seeded(lambda s=scale: layers(s)), images, check=False).report.layers[0].ties
        for scale in (0.3, 1.0)
    ]
    assert ties == [5, 0]  # of float32 sums of +-1, there is no doubt


class Wide(nn.Module):
    """A binary convolution whose sign is taken in float64, where float32 has the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        signs = torch.where(x - 1e-60 >= 0, 1.0, -1.0)
        return F.conv2d(signs, torch.sign(self.weight))


def test_signs_of_float64_are_packed_by_their_values() -> None:
    model = seeded(lambda: Functional(lambda s, x: s.wide(x.double()), wide=Wide())).eval()
    x = images_of((4, 5, 5))
    x[:, :, 2, 2] = 0
    for example in (x, x.double()):
        engine = convert_quietly(model, example)
        assert all(row.packed for row in engine.report.layers)
        with torch.no_grad():
            assert torch.equal(engine(example), model(example))
