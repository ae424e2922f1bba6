"""A binary transformer on text, as BERT is written: BiBERT (Qin et al., ICLR 2022)."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine import convert, load, verify

logger = logging.getLogger(__name__)
WORDS, TOKENS, WIDTH, HEADS = 50, 8, 32, 2


class BinaryLinear(nn.Linear):
    """Signs less a clamp and with it again: a straight-through estimator in floats."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean(1, keepdim=True)
        centred = self.weight - self.weight.mean(-1, keepdim=True)
        clamped = torch.clamp(centred, -1.0, 1.0)
        weight = (scale * torch.sign(centred)).detach() - clamped.detach() + clamped
        held = torch.clamp(x, -1.0, 1.0)
        out = F.linear(torch.sign(x).detach() - held.detach() + held, weight)
        out += self.bias.view(1, -1).expand_as(out)
        return out


def zero_or_one(x: Tensor) -> Tensor:
    out = torch.sign(x)
    out[out == -1] = 0
    return out


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (BinaryLinear(WIDTH, WIDTH) for _ in range(3))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.size()[:-1], HEADS, WIDTH // HEADS).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        logger.debug("attends")
        query, key, value = (
            torch.sign(self.heads(layer(x))) for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5 + mask
        context = (zero_or_one(scores) @ value).permute(0, 2, 1, 3).contiguous()
        return context.view(*context.size()[:-2], WIDTH)  # integers: many are exactly 0


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self = SelfAttention()  # BERT's name
        self.output, self.wide = BinaryLinear(WIDTH, WIDTH), BinaryLinear(WIDTH, 2 * WIDTH)
        self.narrow = BinaryLinear(2 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norms[0](self.output(self.self(x, mask)) + x)
        wide = self.wide(x)
        gelu = wide * 0.5 * (1.0 + torch.erf(wide / 2**0.5))
        narrowed: Tensor = self.norms[1](self.narrow(gelu) + x)
        return narrowed


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH, 0), nn.Embedding(TOKENS, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList([Layer()])

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(tokens.size(1)).unsqueeze(0).expand_as(tokens)
        x = self.norm(self.words(tokens) + self.places(positions))
        hidden = (1.0 - mask[:, None, None].to(torch.float32)) * -10000.0
        for layer in self.layers:
            x = layer(x, hidden)
        logits: Tensor = self.head(torch.tanh(x[:, 0]))
        return logits


def test_a_text_transformer_gives_the_models_bits_in_one_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Text().eval()
    tokens, mask = torch.randint(0, WORDS, (3, TOKENS)), torch.ones(3, TOKENS, dtype=torch.long)
    mask[1, 5:] = 0
    engine = convert(model, (tokens, mask))
    report = verify(engine, model, (tokens, mask))
    assert report.ok
    assert "end to end: no bit differs" in report.summary()
    assert "outside" not in str(engine.execution)
    engine.save(tmp_path / "text.biper")
    assert torch.equal(load(tmp_path / "text.biper")(tokens, mask), engine(tokens, mask))


class AfterGelu(nn.Module):
    """The sign of GELU's result: -0.0, and so no sign, from about -5.5 on."""

    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.approximate, self.inner = approximate, BinaryLinear(WIDTH, 64)
        self.outer, self.norm = BinaryLinear(64, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = 3 * self.inner(x) / self.inner.weight.abs().mean()
        return self.norm(self.outer(F.gelu(y, approximate=self.approximate)) + x)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(2, WIDTH), (2, 5, WIDTH)])
def test_signs_after_gelu_have_its_zeros(approximate: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = AfterGelu(approximate).eval(), torch.randn(shape)
    engine = convert(model, x)
    assert "outside" not in str(engine.execution)
    report = verify(engine, model, x)
    assert report.ok
    assert "end to end: no bit differs" in report.summary()
