"""Piecewise: functions with two slopes become the epilogue, and others do not."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from biper_engine.conversion import convert
from tests.conversion.comparison import Functional, images_of
from tests.conversion.foreign_models import LearnableBias, QConv
from tests.conversion.test_fuse import operators


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(4)
    return {
        "c": QConv(6, 8, 3, padding=1),
        "d": QConv(8, 5, 3),
        "norm": nn.BatchNorm2d(8),
        "p": LearnableBias(8),
        "q": LearnableBias(8),
        "prelu": nn.PReLU(8, init=-0.4),
    }


def maxout(s: Any, v: torch.Tensor) -> torch.Tensor:
    return s.p.bias * F.relu(v) - s.q.bias * F.relu(-v)


FUSED = {
    "Maxout": maxout,
    "Maxout, other order": lambda s, v: F.relu(-v) * s.q.bias + s.p.bias * v.relu(),
    "Maxout, divided": lambda s, v: v.relu() / 0.25 - (v.neg().relu() / s.q.bias),
    "absolute values": lambda s, v: v.abs(),
    "negative halves": lambda s, v: -F.relu(-v),
    "leaky ReLU": lambda s, v: F.leaky_relu(v, 0.3),
    "PReLU": lambda s, v: s.prelu(v),
    "leaky by hand": lambda s, v: F.relu(v) - 0.1 * F.relu(-v),
    "leaky of the negative": lambda s, v: F.leaky_relu(-v, 0.25) * s.p.bias,
    "PReLU of the negative": lambda s, v: v + s.prelu(-2 * v),
    "a sum with itself": lambda s, v: v + 0.5 * v.abs(),
}


@pytest.mark.some(3)
@pytest.mark.parametrize("name", FUSED)
def test_a_function_with_two_slopes_is_fused(name: str) -> None:
    function = FUSED[name]
    model = Functional(
        lambda s, x: s.d(function(s, s.norm(s.c(x)) + x.repeat(1, 2, 1, 1)[:, :8]) - 0.3),
        **layers(),
    )
    model.p.bias.data.uniform_(0.5, 2)
    model.q.bias.data.uniform_(-2, -0.5)
    x = images_of((6, 9, 9))
    engine = convert(model.eval(), x)  # which verifies it
    left = [op for op in operators(engine) if op in ("relu", "neg", "abs", "mul", "div")]
    assert left in ([], ["mul"], ["neg"])  # one factor behind a function that is already fused


@pytest.mark.some(2)
@pytest.mark.parametrize(
    "function",
    [
        lambda s, v: F.relu(v) * v,
        lambda s, v: F.relu(v) - 0.1 * F.relu(0.5 - v),
        lambda s, v: v.abs() + s.p.bias * torch.tanh(v),
        lambda s, v: F.relu(v).amax(1, keepdim=True) + v,
        lambda s, v: torch.cat([F.relu(v), F.relu(-v)], 1)[:, 4:12],
    ],
)
def test_other_functions_are_not(function: Any) -> None:
    model = Functional(lambda s, x: s.d(function(s, s.norm(s.c(x))) - 0.3), **layers()).eval()
    x = images_of((6, 9, 9))
    engine = convert(model, x)
    node = next(n for n in engine.graph_module.graph.nodes if "bconv2d" in str(n.target))
    assert "slope" not in node.kwargs


def test_a_value_that_leaves_is_not_swallowed() -> None:
    def run(s: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        v = s.norm(s.c(x))
        return maxout(s, v), F.relu(v)

    model = Functional(run, **layers()).eval()
    x = images_of((6, 9, 9))
    engine = convert(model, x)
    assert "sub" in " ".join(operators(engine))
