"""Fuse, for linear layers of tokens [N, T, C]: constants of features, residuals and gates."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conversion.comparison import Functional, assert_close, converted, images_of
from tests.conversion.foreign_models import QLinear
from tests.conversion.test_fuse import operators

TOKENS, FEATURES, WIDTH = 5, 24, 40


class Held(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.rand(sizes) + 0.5)


def layers() -> dict[str, nn.Module]:
    return {
        "a": QLinear(FEATURES, WIDTH),
        "c": QLinear(FEATURES, WIDTH),
        "b": QLinear(WIDTH, 7),
        "row": Held(WIDTH),
        "token": Held(1, TOKENS, 1),
        "square": Held(WIDTH, 1),
        "prelu": nn.PReLU(init=0.3),
        "many": nn.PReLU(TOKENS, init=0.3),
        "norm": nn.BatchNorm1d(TOKENS),
        "gate": nn.Linear(FEATURES, WIDTH),
    }


def wide(x: Tensor) -> Tensor:
    return torch.cat([x, x], -1)[..., :WIDTH]


FUSED: dict[str, Any] = {
    "scale and shift": lambda s, x: s.a(x) * s.row.value - s.row.value / 3,
    "residual": lambda s, x: wide(x) + s.a(x) * s.row.value + 0.1,
    "gate of a sample": lambda s, x: s.a(x) * x.abs().mean((1, 2), keepdim=True) + s.row.value,
    "gate of features": lambda s, x: s.a(x) * s.gate(x.mean(1, keepdim=True)).sigmoid() - 0.1,
    "gate of tokens": lambda s, x: s.a(x) * x.abs().mean(-1, keepdim=True) + s.row.value,
    "gate of everything": lambda s, x: s.gate(x) * s.a(x) - 0.1,
    "gate before a residual": lambda s, x: s.a(x) * s.gate(x.amax(1, True)) * 0.5 + wide(x),
    "one slope": lambda s, x: s.prelu(s.a(x) + s.row.value) - 0.1,
    "clamp": lambda s, x: F.hardtanh(s.a(x) * 0.1 + s.row.value) - 0.1,
}

SEPARATE: dict[str, Any] = {
    "scale of tokens": lambda s, x: s.a(x) * s.token.value - 0.1,
    "slopes of tokens": lambda s, x: s.many(s.a(x)) - 0.1,
    "norm of tokens": lambda s, x: s.norm(s.a(x)) - 0.1,
    "turned": lambda s, x: (s.a(x).mT * s.square.value - 0.1).mT,
    "joined": lambda s, x: s.a(x).reshape(-1, TOKENS * WIDTH).reshape(-1, WIDTH, TOKENS).mT - 0.1,
}


@pytest.mark.some(1)
@pytest.mark.parametrize("name", [*FUSED, *SEPARATE])
def test_what_follows_a_layer_of_tokens_is_fused_if_it_is_of_its_features(name: str) -> None:
    run = (FUSED | SEPARATE)[name]
    engine, model, images = converted(
        lambda: Functional(lambda s, x: s.b(run(s, x)), **layers()), (TOKENS, FEATURES)
    )
    assert_close(engine, model, images)
    own = ["bconv2d_bits", "bconv2d_float", "reshape"]  # bits alone go from one to the other
    assert (operators(engine)[-3:] == own) is (name in FUSED)
    assert engine.execution.startswith("one native program")
    for batch in (1, 3, 0):
        assert torch.equal(engine(images[:batch]), engine(images)[:batch])


def test_a_product_of_two_layers_is_a_gate_of_the_later_one() -> None:
    engine, model, images = converted(
        lambda: Functional(lambda s, x: s.b(s.a(x) * s.c(x) + s.row.value), **layers()),
        (TOKENS, FEATURES),
    )
    assert_close(engine, model, images)
    assert_close(engine, model, images_of((TOKENS, FEATURES), 3, seed=7))
    assert "mul" not in " ".join(operators(engine)).replace("bmatmul", "")


@pytest.mark.some(1)
@pytest.mark.parametrize("shape", [(FEATURES,), (3, 2, FEATURES)])
def test_rows_of_any_rank_have_residuals(shape: tuple[int, ...]) -> None:
    engine, model, images = converted(
        lambda: Functional(lambda s, x: s.b(s.a(x) * 0.3 + wide(x)), **layers()), shape
    )
    assert operators(engine)[-3:] == ["bconv2d_bits", "bconv2d_float", "reshape"]
    assert_close(engine, model, images)
