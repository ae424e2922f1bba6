"""Gates: numbers for each image and channel that multiply a binary convolution's result."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biper_engine
from biper_engine.conversion import convert
from biper_engine.conversion.verify import verify
from biper_engine.engine import Engine
from tests.conversion.comparison import (
    Functional,
    assert_close,
    convert_quietly,
    converted,
    images_of,
)
from tests.conversion.foreign_models import LearnableBias, QConv, QLinear
from tests.shared import USABLE_ISAS

C = 8


@pytest.fixture
def isas() -> Iterator[Callable[[str], None]]:
    """Return a function that selects an instruction set until the test ends."""
    from biper_engine import _cpu

    before = _cpu.isa()
    yield _cpu.select_isa
    _cpu.select_isa(before)


class Squeeze(nn.Module):
    """A gate [N, C, 1, 1] of a map, before its last function."""

    def __init__(self, channels: int, outputs: int = C) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
        return y


class Vector(nn.Module):
    """The same of a matrix [N, F], by linear layers."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, 3), nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(F.relu(self.down(x)))
        return y


def layers() -> dict[str, nn.Module]:
    return {
        "c": QConv(6, C, 3, padding=1),
        "e": QConv(6, C, 3, padding=1),
        "d": QConv(C, 5, 3, padding=1),
        "norm": nn.BatchNorm2d(C),
        "se": Squeeze(6),
        "se2": Squeeze(6),
        "late": Squeeze(C),
        "alpha": LearnableBias(C),
        "prelu": nn.PReLU(C, init=0.3),
    }


def wide(x: Tensor) -> Tensor:
    return x.repeat(1, 2, 1, 1)[:, :C]


def scale(x: Tensor) -> Tensor:
    return x.abs().mean((1, 2, 3), keepdim=True)


FUSED: dict[str, Any] = {
    "sigmoid": lambda s, x: s.c(x) * torch.sigmoid(s.se(x)),
    "hard sigmoid": lambda s, x: F.hardsigmoid(s.se(x)) * s.c(x),
    "tanh, of either sign": lambda s, x: s.c(x) * torch.tanh(s.se(x)),
    "any number": lambda s, x: s.c(x) * s.se(x),
    "often 0": lambda s, x: s.c(x) * F.relu(s.se(x)),
    "after BatchNorm": lambda s, x: s.norm(s.c(x)) * s.se(x).sigmoid(),
    "before BatchNorm": lambda s, x: s.norm(s.c(x) * s.se(x).sigmoid()),
    "between two": lambda s, x: s.norm(s.norm(s.c(x)) * s.se(x)),
    "before a residual": lambda s, x: s.norm(s.c(x) * s.se(x).sigmoid()) + wide(x),
    "before PReLU": lambda s, x: s.prelu(s.norm(s.c(x)) * s.se(x) + 0.2),
    "before RPReLU": lambda s, x: s.alpha(s.prelu(s.alpha(s.c(x) * s.se(x)) + wide(x))),
    "before a clamp": lambda s, x: F.hardtanh(s.norm(s.c(x) * s.se(x))),
    "after a pool": lambda s, x: F.max_pool2d(s.c(x), 2) * s.se(x),
    "expanded": lambda s, x: (lambda v: v * s.se(x).sigmoid().expand_as(v))(s.c(x)),
    "a view": lambda s, x: s.c(x) * s.se(x).flatten(1)[:, :, None, None].sigmoid(),
    "einsum": lambda s, x: torch.einsum("nchw,nc->nchw", s.c(x), s.se(x).flatten(1)),
    "negated": lambda s, x: -(s.c(x) * s.se(x)) / 3.0 - 0.25,
    "one for an image": lambda s, x: s.c(x) * scale(x),
    "one for an image, shifted": lambda s, x: s.norm(1.5 + s.c(x) * scale(x)) + wide(x),
    "gate of a sign": lambda s, x: s.c(x) * s.se(x).sign(),
    "two branches": lambda s, x: s.norm(s.c(x) * s.se(x)) + s.norm(s.e(x) * s.se2(x)) * 2.0,
    "one for both": lambda s, x: (lambda g: s.c(x) * g + s.e(x) * g)(s.se(x).sigmoid()),
}

EVERYWHERE = ("before a residual", "before RPReLU", "one for an image, shifted", "two branches")

SEPARATE: dict[str, Any] = {
    "a gate of the result itself": lambda s, x: (lambda v: v * s.late(v).sigmoid())(s.c(x)),
    "a spatial gate": lambda s, x: s.c(x) * wide(x).sigmoid(),
    "a gate of positions": lambda s, x: s.c(x) * x.mean(1, keepdim=True),
    "a gate of rows": lambda s, x: s.c(x) * x.mean((1, 3), keepdim=True),
    "after a residual": lambda s, x: (s.c(x) + wide(x)) * s.se(x),
    "after PReLU": lambda s, x: s.prelu(s.c(x)) * s.se(x),
    "after a clamp": lambda s, x: F.hardtanh(s.c(x)) * s.se(x),
    "a divisor": lambda s, x: s.c(x) / (1.0 + s.se(x).abs()),
    "a square": lambda s, x: (lambda v: v * v)(s.c(x)),
}


def fused_gates(engine: Engine) -> int:
    calls = [n for n in engine.graph_module.graph.nodes if "bconv2d" in str(n.target)]
    return sum("gate" in node.kwargs for node in calls)


def products_left(engine: Engine) -> int:
    return sum("aten.mul" in str(node.target) for node in engine.graph_module.graph.nodes)


def assert_same_everywhere(
    engine: Engine, x: Tensor, isas: Callable[[str], None], folder: Path
) -> None:
    """Require the same bytes in any batch, on any instruction set, and after loading."""
    assert engine.execution.startswith("one native program"), engine.execution
    engine.save(folder / "gates.biper")
    wanted = engine(x)
    with biper_engine.use_backend("reference"):
        again = biper_engine.load(folder / "gates.biper")(x)
    torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-4)  # of the float layers
    for isa in USABLE_ISAS:
        isas(isa)
        loaded = biper_engine.load(folder / "gates.biper")
        for batch in (1, 2, 5, 0):
            assert torch.equal(loaded(x[:batch]), wanted[:batch]), isa


@pytest.mark.some(3)
@pytest.mark.parametrize("name", FUSED)
def test_a_gate_is_fused_with_what_follows(
    name: str, tmp_path: Path, isas: Callable[[str], None]
) -> None:
    run = FUSED[name]
    engine, model, images = converted(
        lambda: Functional(lambda s, x: s.d(run(s, x) - 0.1), **layers()), (6, 8, 8)
    )
    expected = 2 if name in ("two branches", "one for both") else 1
    assert fused_gates(engine) == expected
    assert products_left(engine) == 0
    assert_close(engine, model, images)
    if name in EVERYWHERE:
        assert_same_everywhere(engine, images_of((6, 8, 8), 5), isas, tmp_path)


@pytest.mark.some(3)
@pytest.mark.parametrize("name", SEPARATE)
def test_other_products_stay_operators(name: str) -> None:
    run = SEPARATE[name]
    engine, model, images = converted(
        lambda: Functional(lambda s, x: s.d(run(s, x) - 0.1), **layers()), (6, 8, 8)
    )
    assert fused_gates(engine) == 0
    assert_close(engine, model, images)


def test_a_second_gate_stays_an_operator() -> None:
    engine, model, images = converted(
        lambda: Functional(lambda s, x: s.d(s.c(x) * s.se(x) * s.se2(x) - 0.1), **layers()),
        (6, 8, 8),
    )
    assert (fused_gates(engine), products_left(engine)) == (1, 1)
    assert_close(engine, model, images)


def test_a_max_pool_stays_behind_a_gate_that_may_be_negative() -> None:
    engine, model, images = converted(
        lambda: Functional(lambda s, x: s.d(F.max_pool2d(s.c(x) * s.se(x), 2) - 0.1), **layers()),
        (6, 8, 8),
    )
    assert fused_gates(engine) == 1
    assert any("max_pool2d" in str(n.target) for n in engine.graph_module.graph.nodes)
    assert_close(engine, model, images)


def test_a_gated_value_that_leaves_as_well_is_kept() -> None:
    model = Functional(lambda s, x: (lambda v: (v * s.se(x), v))(s.c(x)), **layers()).eval()
    engine = convert_quietly(model, images_of((6, 8, 8)))
    assert fused_gates(engine) == 0
    model = Functional(lambda s, x: (lambda v: (v, s.d(v)))(s.c(x) * s.se(x)), **layers()).eval()
    engine = convert_quietly(model, images_of((6, 8, 8)))
    assert fused_gates(engine) == 1


@pytest.mark.some(2)
@pytest.mark.parametrize("kind", ["grouped", "transposed", "Conv1d", "ternary", "zeros {0, 1}"])
def test_gates_of_other_layers_mean_what_the_model_means(kind: str) -> None:
    def build() -> nn.Module:
        match kind:
            case "grouped":
                layer: nn.Module = Repeated(96, C, 3, padding=1, groups=2)
            case "transposed":
                layer = Transposed(6, C, 2, stride=2, bias=False)
            case "ternary":
                layer = QConv(6, C, 3, padding=1, binarize=ternary)
            case "zeros {0, 1}":
                layer = QConv(6, C, 3, padding=1, sign=lambda x: (x > 0.1).to(x.dtype))
            case _:
                layer = Row(6, C, 3, padding=1, bias=False)
        rank = "1d" if kind == "Conv1d" else "2d"
        norm = getattr(nn, f"BatchNorm{rank}")(C)
        parts = {"c": layer, "norm": norm, "se": Vector(6, C)}

        def run(s: Any, x: Tensor) -> Tensor:
            squeezed = s.se(x.flatten(2).mean(2)).sigmoid()
            gate = squeezed.reshape(-1, C, *[1] * (x.dim() - 2))
            return (s.norm(s.c(x) * gate) + 0.5).sign()

        return Functional(run, **parts)

    shape = (6, 9) if kind == "Conv1d" else (6, 9, 9)
    engine, model, _ = converted(build, shape)
    assert [row.name for row in engine.report.layers if row.packed] == ["c"]
    for batch in (1, 2, 5):
        assert torch.equal(engine(images_of(shape, batch)), model.eval()(images_of(shape, batch)))


def ternary(w: Tensor) -> Tensor:
    return torch.where(w.abs() < 0.05, 0.0, w.sign()) * 0.5


class Repeated(QConv):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x - 0.05 * i for i in range(16)], 1))


class Row(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x.sign(), self.weight.sign() * 0.25, None, 1, 1)


class Transposed(nn.ConvTranspose2d):
    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        return F.conv_transpose2d(x.sign(), self.weight.sign() * 0.25, None, 2)


@pytest.mark.some(1)
@pytest.mark.parametrize("form", ["features", "sample"])
@pytest.mark.parametrize("shape", [(12,), (4, 12)])
def test_gates_of_a_linear_layer(
    form: str, shape: tuple[int, ...], tmp_path: Path, isas: Callable[[str], None]
) -> None:
    def build() -> nn.Module:
        def run(s: Any, x: Tensor) -> Tensor:
            rows = x if x.dim() == 2 else x.mean(1)
            gate = s.se(rows) if form == "features" else rows.abs().mean(1, keepdim=True)
            gate = gate if x.dim() == 2 else gate[:, None]
            y = s.a(x) * gate + 0.25
            return s.b(y if x.dim() > 2 else s.norm(y))

        parts = {"a": QLinear(12, 9), "b": QLinear(9, 7), "norm": nn.BatchNorm1d(9)}
        return Functional(run, **parts, se=Vector(12, 9))

    engine, model, images = converted(build, shape)
    assert_close(engine, model, images)
    assert (fused_gates(engine), products_left(engine)) == (1, 0)
    assert_same_everywhere(engine, images_of(shape, 5), isas, tmp_path)


@pytest.mark.some(2)
@pytest.mark.parametrize("number", [0.0, -1.0, torch.inf, "NaN"])
def test_gates_with_special_numbers_reach_the_result(number: Any) -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        first = x[:, :1, :1, :1]
        gate = (
            s.se(x) + first.sqrt() if number == "NaN" else torch.where(first > 0, number, s.se(x))
        )
        return s.norm(s.c(x) * gate) + wide(x)

    engine, model, images = converted(lambda: Functional(run, **layers()), (6, 8, 8))
    wanted = model.eval()(images)
    torch.testing.assert_close(engine(images), wanted, equal_nan=True)
    assert torch.equal(engine(images).isnan(), wanted.isnan())


@pytest.mark.some(1)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_in_half_precision(dtype: torch.dtype) -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        return s.d(s.prelu(s.norm(s.c(x) * s.se(x).sigmoid()) + wide(x)) * 0.5)

    engine, model, images = converted(
        lambda: Functional(run, **layers()), (6, 8, 8), compute_dtype=dtype
    )
    assert fused_gates(engine) == 1
    assert verify(engine, model, images).ok


def test_a_gate_may_be_an_input() -> None:
    model = Functional(lambda s, x, g: s.norm(s.c(x) * g) + wide(x), **layers()).eval()
    x, gate = images_of((6, 8, 8)), images_of((C, 1, 1), 4)
    engine = convert(model, (x, gate))
    assert fused_gates(engine) == 1
    torch.testing.assert_close(engine(x, gate), model(x, gate))
    with pytest.raises(ValueError, match="one N for all"):
        engine(x, gate[:2])
