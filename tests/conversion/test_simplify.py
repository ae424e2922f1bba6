"""Simplify: different forms of the same computation become one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.conversion.capture import capture
from biper_engine.conversion.simplify import simplify
from tests.conversion.comparison import Functional, images_of
from tests.conversion.foreign_models import lived_in


def simplified(run: Callable[..., Tensor], x: Tensor, **layers: nn.Module) -> list[str]:
    """Simplify and check that values stay equal; return the operators, in order."""
    model = Functional(run, **layers).eval()
    graph_module = capture(model, (x,)).graph_module
    simplify(graph_module)
    for batch in (x, x[:1]):
        with torch.no_grad():
            torch.testing.assert_close(graph_module(batch)[0], model(batch.clone()))
    calls = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    return [str(node.target).split(".")[1] for node in calls]


X = images_of((4, 6, 6))


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        (lambda self, x: x.view(x.size(0), -1), ["reshape"]),
        (lambda self, x: x.flatten(1).unsqueeze(2).squeeze(2), ["reshape"]),
        (lambda self, x: x.transpose(1, 2), ["permute"]),
        (lambda self, x: x.permute(0, 1, -2, 3).abs(), ["abs"]),
        (lambda self, x: x.transpose(1, 2).transpose(2, 1).abs(), ["abs"]),
        (lambda self, x: x.permute(0, 2, 3, 1).transpose(1, 3), ["permute"]),
        (lambda self, x: x.unsqueeze(1).transpose(1, 2).flatten(1, 2).abs(), ["abs"]),
        (lambda self, x: x.detach().clone().contiguous().abs(), ["abs"]),
        (lambda self, x: x.float().abs(), ["abs"]),
        (lambda self, x: F.dropout(x, training=self.training).abs(), ["abs"]),
        (lambda self, x: x.abs() * x.abs(), ["abs", "mul"]),
        (lambda self, x: torch.sign(x).detach() - x.detach() + x, ["sign"]),
        (lambda self, x: x + (torch.sign(x) - x).detach(), ["sign"]),
        (lambda self, x: F.max_pool2d(x, 2), ["max_pool2d"]),
        (lambda self, x: torch.sign(F.pad(x, (1, 1, 0, 0))), ["sign", "constant_pad_nd"]),
        (lambda self, x: F.relu(F.pad(x, (1, 1))), ["relu", "constant_pad_nd"]),
        (lambda self, x: F.hardtanh(F.pad(x, (1, 1)), 0.5, 1), ["constant_pad_nd", "hardtanh"]),
        (lambda self, x: torch.sign(F.pad(x, (1, 1), value=1.0)), ["constant_pad_nd", "sign"]),
    ],
)
def test_one_spelling(run: Callable[..., Tensor], wanted: list[str]) -> None:
    assert simplified(run, X) == wanted


def test_a_masked_write_becomes_where() -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        y = x.round()
        y[y == 0] = 1
        return y

    assert simplified(run, X) == ["round", "eq", "where"]


def test_batch_norm_and_convolutions_have_one_form() -> None:
    norm = nn.BatchNorm2d(5)
    lived_in(norm)
    layers = {"conv": nn.Conv2d(4, 5, 3, padding="same"), "norm": norm}
    assert simplified(lambda self, x: self.norm(self.conv(x)), X, **layers) == [
        "conv2d",
        "batch_norm",
    ]


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_products_with_a_constant_matrix_become_linear(shape: tuple[int, ...]) -> None:
    x = images_of(shape)
    called = simplified(lambda self, x: self.fc(x), x, fc=nn.Linear(4, 5))
    assert called.count("linear") == 1
    assert set(called) <= {"linear", "reshape", "add"}


def test_a_linear_layer_on_channels_that_are_not_last_is_linear() -> None:
    called = simplified(lambda self, x: self.fc(x.permute(0, 2, 3, 1)), X, fc=nn.Linear(4, 5))
    assert called.count("linear") == 1
    assert "bmm" not in called


def test_a_straight_through_form_of_another_value_stays() -> None:
    called = simplified(lambda self, x: torch.sign(x) - x.abs() + x, X)
    assert called == ["sign", "abs", "sub", "add"]


def test_a_parameter_expanded_over_the_batch_keeps_its_batch() -> None:
    token = nn.Conv2d(1, 1, 1)
    simplified(
        lambda self, x: torch.cat([x, self.token.weight.expand(x.size(0), 2, 6, 6)], 1),
        X,
        token=token,
    )
