"""Products: every operator that multiplies has a row, with its cost at every position."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.conversion import convert
from biper_engine.conversion.pipeline import build
from biper_engine.errors import ConversionError, UnconvertedWarning
from biper_engine.report import LayerReport
from tests.conversion.comparison import Functional, images_of
from tests.conversion.foreign_models import QConv, QLinear, seeded, where_ge


def rows_of(model: nn.Module, *shapes: tuple[int, ...]) -> list[LayerReport]:
    """Return the rows of a model that takes images of `shapes`, without converting it."""
    examples = tuple(images_of(shape, 3) for shape in shapes)
    return build(model.eval(), examples, keep_float=(), compute_dtype=torch.float32).rows


@dataclass
class Case:
    run: Callable[..., Any]
    layer: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    rows: list[tuple[str, tuple[int, ...], int]]  # kind, shape, MACs


CASES = {
    "conv1d": Case(
        lambda s, x: s.c(x),
        lambda: nn.Conv1d(4, 6, 3, padding=2, groups=2, dilation=2),
        ((4, 9),),
        [("conv1d", (6, 2, 3), 9 * 6 * 2 * 3)],
    ),
    "conv3d": Case(
        lambda s, x: s.c(x),
        lambda: nn.Conv3d(4, 6, 3, stride=2),
        ((4, 5, 7, 7),),
        [("conv3d", (6, 4, 3, 3, 3), 2 * 3 * 3 * 6 * 4 * 27)],
    ),
    "transposed, every input position": Case(
        lambda s, x: s.c(x),
        lambda: nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2),
        ((8, 5, 6),),
        [("conv_transpose2d", (8, 3, 4, 4), 30 * 8 * 3 * 16)],
    ),
    "transposed in one dimension": Case(
        lambda s, x: s.c(x),
        lambda: nn.ConvTranspose1d(8, 6, 4),
        ((8, 5),),
        [("conv_transpose1d", (8, 6, 4), 5 * 8 * 6 * 4)],
    ),
    "linear on tokens": Case(
        lambda s, x: s.c(x), lambda: nn.Linear(8, 5), ((7, 8),), [("linear", (5, 8), 7 * 40)]
    ),
    "linear on rows of tokens": Case(
        lambda s, x: s.c(x), lambda: nn.Linear(8, 5), ((3, 7, 8),), [("linear", (5, 8), 21 * 40)]
    ),
    "weight on the left": Case(
        lambda s, x: s.c.weight @ x, lambda: nn.Linear(8, 5), ((8, 7),), [("linear", (5, 8), 280)]
    ),
    "einsum with a weight": Case(
        lambda s, x: torch.einsum("ok,nkl->nol", s.c.weight, x),
        lambda: nn.Linear(8, 5),
        ((8, 7),),
        [("linear", (5, 8), 280)],
    ),
    "einsum of two activations": Case(
        lambda s, x, y: torch.einsum("bid,bjd->bij", x, y),
        nn.Identity,
        ((7, 8), (5, 8)),
        [("matmul", (8, 5), 280)],
    ),
    "products of two activations": Case(
        lambda s, x: torch.baddbmm(x @ x, x, x),
        nn.Identity,
        ((6, 6),),
        [("matmul", (6, 6), 216)] * 2,
    ),
    "a vector": Case(
        lambda s, x: x @ s.c.bias, lambda: nn.Linear(2, 8), ((8,),), [("linear", (1, 8), 8)]
    ),
    "attention": Case(
        lambda s, x: F.scaled_dot_product_attention(x, x, x),
        nn.Identity,
        ((2, 7, 8),),
        [("attention", (7, 8), 2 * 7 * 7 * 16)],
    ),
    "a recurrent cell": Case(
        lambda s, x: s.c(x),
        lambda: nn.GRUCell(8, 4),
        ((8,),),
        [("linear", (12, 8), 96), ("linear", (12, 4), 48)],
    ),
    "bilinear": Case(
        lambda s, x: s.c(x, x),
        lambda: nn.Bilinear(8, 8, 4),
        ((8,),),
        [("bilinear", (4, 8, 8), 256)],
    ),
}


@pytest.mark.some(3)
@pytest.mark.parametrize("name", CASES)
def test_every_product_has_a_row_with_its_macs(name: str) -> None:
    case = CASES[name]
    rows = rows_of(seeded(lambda: Functional(case.run, c=case.layer())), *case.shapes)
    found = [(row.kind, row.shape, row.macs) for row in rows]
    assert sorted(found) == sorted(case.rows)
    assert all(row.reason and not row.packed and not row.binary for row in rows)


def test_a_recurrent_layer_has_its_steps_and_both_weights() -> None:
    rows = rows_of(seeded(lambda: Functional(lambda s, x: s.c(x)[0], c=nn.LSTM(8, 4))), (3, 8))
    assert sum(row.macs for row in rows) == 3 * (16 * 8 + 16 * 4)
    assert all(row.name.partition("#")[0] == "c" for row in rows)


@pytest.mark.some(1)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_recurrent_layer_over_steps_of_a_batch_converts(layers: int) -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        return self.head(self.c(x)[0][:, -1])

    model = seeded(
        lambda: Functional(run, c=nn.LSTM(8, 8, layers, batch_first=True), head=QLinear(8, 4))
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnconvertedWarning)
        engine = convert(model, images_of((5, 8)))
    assert [row.packed for row in engine.report.layers] == [False] * layers + [True]
    assert all("distinct values" in row.reason for row in engine.report.layers[:layers])
    for batch in (1, 3):
        x = torch.randn(batch, 5, 8)
        with torch.no_grad():
            torch.testing.assert_close(engine(x), model(x))


def test_a_binary_product_whose_batch_is_not_the_first_dimension() -> None:
    model = seeded(
        lambda: Functional(
            lambda s, x: torch.einsum("bchw,oc->bohw", where_ge(x), torch.sign(s.c.weight)),
            c=nn.Linear(8, 4),
        )
    ).eval()
    engine = convert(model, images_of((8, 3, 3)))
    assert [row.packed for row in engine.report.layers] == [True]
    x = torch.randn(5, 8, 3, 3)
    with torch.no_grad():
        assert torch.equal(engine(x), model(x))


def test_attention_of_a_module_is_named_by_its_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    rows = rows_of(Functional(lambda s, x: s.body(x), body=layer), (5, 8))
    assert sum(row.macs for row in rows) == 5 * (8 * 24 + 8 * 8 + 2 * 8 * 16) + 2 * 25 * 8
    assert {row.name.partition("#")[0] for row in rows} == {
        *("body.self_attn", "body.linear1", "body.linear2")
    }


BINARY: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module], tuple[int, ...], str]] = {
    "conv3d": (
        lambda s, x: F.conv3d(where_ge(x)[:, None], where_ge(s.c.weight)),
        lambda: nn.Conv3d(1, 6, 3),
        (4, 5, 5),
        "3-D convolutions do not run on bits, though its input and its weight are binary",
    ),
    "weights of a conv1d": (
        lambda s, x: F.conv1d(x, where_ge(s.c.weight)),
        lambda: nn.Conv1d(4, 6, 3),
        (4, 9),
        "its weight is binary, but its input is the network's input",
    ),
}


@pytest.mark.parametrize("name", BINARY)
def test_binary_products_that_stay_float_give_a_warning(name: str) -> None:
    run, layer, shape, reason = BINARY[name]

    def whole(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return run(self, x), self.ok(x.reshape(-1, 1, 1, shape[-1]))

    model = seeded(lambda: Functional(whole, c=layer(), ok=QConv(1, 4, (1, 3))))
    with pytest.warns(UnconvertedWarning, match=r"1 binary layer.*of all MACs") as caught:
        engine = convert(model, images_of(shape))
    assert reason in str(caught[0].message)
    assert [row.packed for row in engine.report.layers] == [False, True]


def test_no_layer_to_pack_says_what_there_is() -> None:
    with pytest.raises(ConversionError, match="No binary layer found in 1 other product"):
        convert(Functional(lambda s, x: x @ x), images_of((4, 4)))
    model = Functional(lambda s, x: s.l(s.c(x)), c=nn.Conv1d(2, 4, 3), l=nn.Linear(6, 2))
    with pytest.raises(ConversionError, match="1 convolution and 1 linear layer"):
        convert(model, images_of((2, 8)))


def test_a_recurrent_layer_with_binary_weights_has_a_row_with_its_reason() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 8, batch_first=True)
            self.head = nn.Parameter(torch.randn(4, 8))
            for parameter in self.lstm.parameters():
                parameter.data.sign_()

        def forward(self, x: Tensor) -> Tensor:
            states, _ = self.lstm(x)
            return F.linear(states[:, -1].sign(), 0.1 * self.head.sign())

    row = rows_of(Recurrent(), (5, 6))[0]
    assert (row.name, row.kind, row.packed, row.binary) == ("lstm", "recurrent", False, True)
    assert "recurrent layers do not run on bits, though its weight is binary" in row.reason
