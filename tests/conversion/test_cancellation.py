"""Sums whose terms cancel: rounding is no error there, and an error is no rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biper_engine
from biper_engine.conversion import pipeline
from biper_engine.conversion.segments import Segments
from biper_engine.conversion.truth import Truth
from biper_engine.conversion.verify_report import SegmentReport

ULP = 2.0**-24


class Signs(nn.Module):
    """A binary layer behind floats, which are an output, too."""

    def __init__(self, floats: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.floats = floats
        self.register_buffer("weight", torch.where(torch.randn(8, channels) >= 0, 1.0, -1.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.floats(x)
        rows = y if y.dim() == 2 else y.mean((2, 3))
        return nn.functional.linear(torch.where(rows >= 0, 1.0, -1.0), self.weight), y


def centred(layer: nn.Module) -> nn.Module:
    """Take the mean from each row of the weights, so that large equal inputs cancel."""
    weight = layer.weight.data
    weight -= weight.mean(tuple(range(1, weight.dim())), keepdim=True)
    return layer


def normed(channels: int, mean: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.fill_(mean)
    norm.running_var.uniform_(0.5, 2.0)
    norm.weight.data.uniform_(0.5, 2.0)
    norm.bias.data.normal_()
    return norm.eval()


class Halves(nn.Module):
    """A sum of values of both signs."""

    def __init__(self, operator: Callable[..., Tensor]) -> None:
        super().__init__()
        self.operator = operator
        self.register_buffer("sign", torch.tensor([1.0, -1.0]).repeat(50))

    def forward(self, x: Tensor) -> Tensor:
        return self.operator((x * self.sign).unflatten(1, (4, 25)).transpose(1, 2), 2)


MAPS, ROWS = (3, 8, 8), (100,)
CASES: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], tuple[int, ...], int]] = {
    "conv": (lambda: centred(nn.Conv2d(3, 32, 3, bias=False)), MAPS, 32),
    "conv and batch norm": (
        lambda: nn.Sequential(centred(nn.Conv2d(3, 32, 3, bias=False)), normed(32, 1e-3)), MAPS, 32,
    ),
    "batch norm": (lambda: normed(3, 1000.0), MAPS, 3),
    "linear": (lambda: centred(nn.Linear(100, 16, bias=False)), ROWS, 16),
    "linear with a bias": (lambda: nn.Linear(100, 16), ROWS, 16),
    "mean": (lambda: Halves(torch.mean), ROWS, 25),
    "sum": (lambda: Halves(torch.sum), ROWS, 25),
    "difference": (lambda: lambda x: 2 * x - (x + 1000.0), MAPS, 3),
}  # fmt: skip


def inputs_of(name: str, floats: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """Return inputs near 1000, with which the sums of a case cancel."""
    x = 1000 + 1e-3 * torch.randn(4, *shape)
    if name == "linear with a bias":
        assert isinstance(floats, nn.Linear)
        floats.bias.data = -floats(x).mean(0).detach() + floats.bias.data
    return x


def compared(
    model: nn.Module, x: Tensor, change: Callable[[Tensor], Tensor]
) -> tuple[SegmentReport, Tensor]:
    """Compare an engine whose first float map was changed; return its row, and the true map."""
    built = pipeline.build(model, (x,), keep_float=(), compute_dtype=torch.float32)
    truth = Truth(built, [x])
    truth.add_simplified(None)
    (outputs,) = (n.args[0] for n in built.lowered.graph.nodes if n.op == "output")
    node = outputs[1]
    original: Any = node.target
    node.target = lambda *args, **kwargs: change(original(*args, **kwargs))
    rows: dict[str, SegmentReport] = {}
    Segments(built, truth, rows).run(x)
    name = str(node.meta.get("layer", node.name))
    return rows[name], truth.values[node.meta["source"]]


@pytest.mark.some(2)
@pytest.mark.parametrize("name", CASES)
def test_rounding_of_the_terms_is_no_error_and_an_error_is_none(name: str) -> None:
    torch.manual_seed(5)
    make, shape, channels = CASES[name]
    floats = make()
    x = inputs_of(name, floats, shape)
    model = Signs(floats, channels).eval()
    true = model(x)[1].detach()
    terms = 1000.0  # of the smallest magnitude in all cases: weights sum up to 1 or more
    assert float(true.abs().max()) < terms / 10
    row, _ = compared(model, x, lambda y: y + ULP * terms)
    assert row.ok, row
    for much in (1e-5, -1e-4, 0.5):
        row, _ = compared(model, x, lambda y, much=much: y + much * terms)
        assert not row.ok, (much, row)
    row, _ = compared(model, x, lambda y: 1.05 * y + 2e-4 * terms)
    assert not row.ok


def test_a_sum_that_does_not_cancel_has_no_more_room_than_before() -> None:
    torch.manual_seed(5)
    model, x = Signs(nn.Conv2d(3, 32, 3), 32).eval(), torch.randn(4, 3, 8, 8)
    largest = float(model(x)[1].detach().abs().max())
    row, _ = compared(model, x, lambda y: y + 0.5e-4 * largest)
    assert row.ok
    assert row.cancelled == 0
    row, _ = compared(model, x, lambda y: y + 2e-4 * largest)
    assert not row.ok


def test_one_wrong_element_among_those_that_cancel_is_found() -> None:
    torch.manual_seed(5)
    x = 1000 + 1e-3 * torch.randn(4, *MAPS)
    model = Signs(centred(nn.Conv2d(3, 32, 3, bias=False)), 32).eval()

    def one(y: Tensor) -> Tensor:
        y = y + ULP * 1000
        y[3, 7, 2, 2] += 0.5
        return y

    row, _ = compared(model, x, one)
    assert not row.ok
    assert row.cancelled > 0


def test_what_is_no_sum_has_no_more_room() -> None:
    torch.manual_seed(5)
    x = 1000 + 1e-3 * torch.randn(4, *ROWS)
    model = Signs(lambda y: torch.sigmoid(y) - 1.0 + 1e-9 * y, 100).eval()
    row, true = compared(model, x, lambda y: y + 1e-3 * y.abs().max())
    assert float(true.abs().max()) < 1e-3
    assert not row.ok


def test_a_network_that_cancels_is_equal_and_says_so() -> None:
    torch.manual_seed(5)
    floats = nn.Sequential(centred(nn.Conv2d(3, 32, 3, bias=False)), nn.BatchNorm2d(32))
    floats[1].running_var.uniform_(0.5, 2.0)
    model, x = Signs(floats, 32).eval(), 1000 + 1e-3 * torch.randn(4, *MAPS)
    engine = biper_engine.convert(model, x, check=False)
    report = biper_engine.verify(engine, model, x)
    assert report.ok, str(report)
    first, *_ = str(report).splitlines()
    assert "float values differ by the rounding of the terms" in first
    assert '"cancelled":' in report.to_json()


class NormCancels(nn.Module):
    """A binary convolution of bright images, whose sums the norm takes away nearly."""

    def __init__(self, away: float) -> None:
        super().__init__()
        self.register_buffer("weight", torch.where(torch.randn(8, 32, 1, 1) >= 0, 1.0, -1.0))
        self.norm = normed(8, 0.0)
        self.norm.bias.data.zero_()
        self.norm.running_mean = 0.37 * self.weight.sum((1, 2, 3)) * (1 + away)

    def forward(self, x: Tensor) -> Tensor:
        signs = torch.where(x >= 0, 1.0, -1.0)
        return self.norm(0.37 * nn.functional.conv2d(signs, self.weight))


def test_a_binary_layer_whose_norm_takes_its_sums_away_is_equal() -> None:
    torch.manual_seed(5)
    model, x = NormCancels(1e-6).eval(), torch.rand(4, 32, 4, 4)
    engine = biper_engine.convert(model, x, check=False)
    report = biper_engine.verify(engine, model, x)
    assert report.ok, str(report)
    assert sum(row.cancelled for row in report.segments) > 0
