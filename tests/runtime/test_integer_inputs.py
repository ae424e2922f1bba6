"""Inputs of integers in native programs: tokens of an embedding, and masks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine import convert, load, verify
from biper_engine.serialization import container

pytestmark = pytest.mark.usefixtures("cpu_backend")

ROWS, TOKENS = 40, 6


class BinaryLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.sign(x), torch.sign(self.weight), self.bias)


class Text(nn.Module):
    """A binary transformer's layer on embedded tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(ROWS, width, 0), nn.Embedding(TOKENS, width)
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (BinaryLinear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 3)
        self.register_buffer("positions", torch.arange(TOKENS)[None])

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.words(tokens) + self.places(self.positions))
        hidden = (1.0 - mask[:, None, :].to(torch.float32)) * -1e4
        products = torch.sign(self.query(x)) @ torch.sign(self.key(x)).transpose(1, 2)
        attended = torch.softmax(products / 8 + hidden, -1) @ self.value(x)
        logits: Tensor = self.head(attended[:, 0])
        return logits


def made(dtype: torch.dtype = torch.int64) -> tuple[Text, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    tokens, mask = torch.randint(0, ROWS, (3, TOKENS)), torch.ones(3, TOKENS)
    mask[1, 4:] = 0
    return Text().eval(), (tokens.to(dtype), mask.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_binary_transformer_on_tokens_is_one_program(dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = made(dtype)
    engine = convert(model, inputs)
    assert str(engine.execution).startswith("one native program of ")
    assert "outside" not in str(engine.execution)
    assert verify(engine, model, inputs).ok
    engine.save(tmp_path / "text.biper")
    assert torch.equal(load(tmp_path / "text.biper")(*inputs), engine(*inputs))
    # Tokens and masks in other memory.
    turned = tuple(x.t().contiguous().t() for x in inputs)
    assert torch.equal(engine(*turned), engine(*inputs))


@pytest.mark.parametrize("token", [ROWS, -1, 2**40, -(2**63)])
def test_a_token_without_a_row_is_an_index_error(token: int) -> None:
    model, (tokens, mask) = made()
    engine = convert(model, (tokens, mask))
    wanted = engine(tokens, mask)
    wrong = tokens.clone()
    wrong[2, 3] = token
    with pytest.raises(IndexError, match=rf"embedding of {ROWS} rows is {token}\."):
        engine(wrong, mask)
    assert torch.equal(engine(tokens, mask), wanted)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_c_library_says_that_it_takes_no_integers(dtype: torch.dtype, tmp_path: Path) -> None:
    convert(*made(dtype)).save(tmp_path / "text.biper")
    header, _ = container.read(tmp_path / "text.biper")
    assert header["program"]["reason"] == "the C library takes no inputs of integers"


class Compared(nn.Module):
    def __init__(self, compare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compare, self.words, self.binary = compare, nn.Embedding(9, 32), BinaryLinear(32, 8)

    def forward(self, tokens: Tensor, others: Tensor) -> Tensor:
        told: Tensor = self.compare(others)
        scaled: Tensor = self.binary(self.words(tokens)) * told[..., None]
        return scaled


@pytest.mark.parametrize(
    ("compare", "native"),
    [
        (lambda x: (x != 0).float(), True),
        (lambda x: (x > 2**24 - 1).float(), True),
        (lambda x: (x > 2**24).float(), False),
        (lambda x: (x <= x.flip(1)).float(), False),
        (lambda x: x.float(), True),
        (lambda x: (x + 1).float(), False),
        (lambda x: x * 0.5, True),
    ],
    ids=["unequal", "at the limit", "beyond it", "two", "float", "sum", "product"],
)
def test_integers_that_floats_do_not_hold_are_compared_as_integers(
    compare: Callable[[Tensor], Tensor], native: bool
) -> None:
    model = Compared(compare).eval()
    tokens = torch.arange(8).reshape(2, 4)
    others = torch.tensor(
        [[0, 1, 2**24 - 1, 2**24], [2**24 + 1, -(2**24) - 1, 2**62 + 1, -(2**40)]]
    )
    engine = convert(model, (tokens, others))
    assert torch.equal(engine(tokens, others), model(tokens, others))
    assert ("outside" not in str(engine.execution)) == native
