"""Native programs of values whose batch is not the first dimension: one program each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biper_engine
from biper_engine.ops.cpu_module import native
from tests.conversion.comparison import Functional
from tests.conversion.foreign_models import QConv, QLinear, seeded
from tests.images import noise

pytestmark = [
    pytest.mark.skipif(native() is None, reason="there are no native kernels"),
    pytest.mark.filterwarnings("ignore::biper_engine.errors.UnconvertedWarning"),
]

Run = Callable[[Any, Tensor], Tensor]


def swapped(run: Run) -> Run:
    """Run something on [T, N, C] instead of [N, T, C]."""
    return lambda s, x: run(s, x.transpose(0, 1)).transpose(0, 1)


def residual_attention(s: Any, x: Tensor) -> Tensor:
    return s.b(x + s.a(x, x, x, need_weights=False)[0])


def arithmetic(s: Any, x: Tensor) -> Tensor:
    x = (x - s.p) * 2 / (x.abs() + 1) + x.mean(2, keepdim=True)
    return s.b(torch.where(x > 0, x, torch.sigmoid(x)) + s.p[:, 0, 0].view(-1, 1, 1))


def along_dimensions(s: Any, x: Tensor) -> Tensor:
    y = F.log_softmax(x, 2) + x.softmax(0) + x.sum(0) - x.amax((0, 2)).unsqueeze(1)
    return s.b(F.layer_norm(y, (16,), s.p[0, 0]))


def binary_heads(s: Any, x: Tensor) -> Tensor:
    steps, batch, width = x.shape

    def heads(y: Tensor) -> Tensor:
        return torch.sign(y + 0.01).reshape(steps, batch * 2, width // 2).transpose(0, 1)

    scores = torch.bmm(heads(s.b(x)), heads(s.c(x)).transpose(1, 2)) * 0.1
    y = torch.bmm((scores.softmax(-1) > 0.1).float(), heads(x))
    return x + y.transpose(0, 1).reshape(steps, batch, width)


def binary_heads_beside_a_norm(s: Any, x: Tensor) -> Tensor:
    return s.b(s.n(binary_heads(s, x)) + s.p)


def learned_queries(s: Any, x: Tensor) -> Tensor:
    batch = x.shape[1]
    queries = s.p.expand(-1, batch, -1)
    more = torch.zeros(6, batch, 16) + s.p.repeat(1, batch, 1)
    return s.b(s.a(queries + more, x, x)[0] + queries)


CASES: dict[str, tuple[Run, bool]] = {
    "attention with the batch second": (swapped(residual_attention), False),
    "attention with the batch first": (residual_attention, True),
    "arithmetic": (swapped(arithmetic), False),
    "along dimensions": (swapped(along_dimensions), False),
    "binary heads": (swapped(binary_heads_beside_a_norm), False),
    "learned queries": (swapped(learned_queries), False),
}


@pytest.mark.some(1)
@pytest.mark.parametrize("name", CASES)
def test_tokens_with_the_batch_second_are_one_program(name: str) -> None:
    run, batch_first = CASES[name]
    parts = {
        "a": lambda: nn.MultiheadAttention(16, 2, batch_first=batch_first),
        "b": lambda: QLinear(16, 16),
        "c": lambda: QLinear(16, 16),
        "n": lambda: nn.LayerNorm(16),
    }
    model = seeded(lambda: Functional(run, **{key: part() for key, part in parts.items()}))
    model.p = nn.Parameter(noise(6, 1, 16, seed=3))
    engine = biper_engine.convert(model, noise(2, 6, 16))
    assert engine.report.packed >= 1
    assert engine.execution.startswith("one native program")
    assert "outside" not in engine.execution
    x = noise(5, 6, 16, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(engine(x), model(x), rtol=1e-4, atol=1e-4)
    rows = torch.cat([engine(row[None]) for row in x])
    assert torch.equal(rows, engine(x))


@pytest.mark.deep
def test_a_transformer_behind_binary_convolutions_is_one_program() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        tokens = s.conv(x).flatten(2).permute(2, 0, 1)
        return s.head(s.layer(tokens).mean(0))

    model = seeded(
        lambda: Functional(
            run,
            conv=QConv(4, 16, 3, padding=1),
            layer=nn.TransformerEncoderLayer(16, 2, 24),
            head=nn.Linear(16, 3),
        )
    )
    engine = biper_engine.convert(model, noise(2, 4, 4, 4))
    assert engine.execution.startswith("one native program")
    assert "outside" not in engine.execution
    assert biper_engine.verify(engine, model, noise(3, 4, 4, 4, seed=1)).ok


@pytest.mark.parametrize("affine", [False, True])
def test_a_norm_of_each_channel_of_each_image_is_part_of_the_program(affine: bool) -> None:
    """PyTorch computes it as a batch norm of [1, N * C, H, W]."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(4, 16, 3), nn.InstanceNorm2d(16, affine=affine), QConv(16, 8, 3)
        )
    )
    if affine:
        model[1].weight.data, model[1].bias.data = noise(16, seed=2) + 2, noise(16, seed=3)
    engine = biper_engine.convert(model, noise(2, 4, 7, 6))
    assert engine.execution.startswith("one native program")
    assert "outside" not in engine.execution
    x = noise(5, 4, 7, 6, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(engine(x), model(x))


def test_weights_that_are_repeated_for_tokens_are_one_layer() -> None:
    """The projection of attention with the batch second is a product with a repeated matrix."""
    model = seeded(
        lambda: Functional(
            lambda s, x: torch.matmul(x.sign().transpose(0, 1), s.w.sign().expand(6, 16, 8)),
        )
    )
    model.w = nn.Parameter(noise(16, 8, seed=2))
    engine = biper_engine.convert(model, noise(2, 6, 16))
    (row,) = engine.report.layers
    assert row.packed
    assert row.shape == (8, 16)
    x = noise(3, 6, 16, seed=1)
    with torch.no_grad():
        assert torch.equal(engine(x), model(x))
