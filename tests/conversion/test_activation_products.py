"""Products of two binary activations: recognised, packed, verified, and as the model computes."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import biper_engine
from biper_engine.engine import Engine
from biper_engine.graph.reading import biper_op
from tests.images import noise


def sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


class BinaryLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean(1, keepdim=True)
        return F.linear(sign(x), sign(self.weight) * scale, self.bias)


class Heads(nn.Module):
    """Attention whose products both have binary operands; `probabilities` makes {0, s}."""

    def __init__(self, width: int, heads: int, probabilities: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.heads, self.probabilities = heads, probabilities
        self.q, self.k, self.v = (BinaryLinear(width, width) for _ in range(3))

    def split(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        return x.view(n, tokens, self.heads, width // self.heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (sign(self.split(f(x))) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        mixed = self.probabilities(scores) @ v
        return mixed.transpose(1, 2).flatten(2)


class Two(nn.Module):
    """A product of two inputs, after a binary layer that makes the model one to convert."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product, self.layer = product, BinaryLinear(8, 8)

    def forward(self, a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.product(a, b), self.layer(x)


def converted(model: nn.Module, *inputs: Tensor) -> Engine:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return biper_engine.convert(model.eval(), inputs)  # which verifies it


def nodes_of(engine: Engine, op: str) -> list[fx.Node]:
    return [node for node in engine.graph_module.graph.nodes if biper_op(node) == op]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def rounded(scores: Tensor) -> Tensor:
    return (torch.softmax(scores, -1) / 0.05).round().clamp(0, 1) * 0.05


PROBABILITIES = {
    "softmax in two levels": rounded,
    "compared": lambda scores: (scores > 0).to(scores.dtype),
    "signs": sign,
    "two values": lambda scores: torch.where(scores >= 0.5, 0.7, -0.2),
}


@pytest.mark.some(1)
@pytest.mark.parametrize("name", PROBABILITIES)
def test_both_products_of_binary_attention_are_packed_also_in_a_file(
    name: str, tmp_path: Path
) -> None:
    model = seeded(lambda: Heads(48, 3, PROBABILITIES[name]))
    x = noise(2, 7, 48)
    engine = converted(model, x)
    engine.save(tmp_path / "attention.biper")
    assert torch.equal(biper_engine.load(tmp_path / "attention.biper")(x), engine(x))
    assert [row.name for row in engine.report.layers if not row.packed] == []
    assert len(nodes_of(engine, "bmatmul_float")) == 2
    for batch in (1, 2, 5):
        x = noise(batch, 7, 48, seed=batch)
        torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_sums_of_a_product_are_compared_with_the_models() -> None:
    model = seeded(lambda: Heads(48, 3, sign))
    x = noise(2, 7, 48)
    engine = biper_engine.convert(model, x, check=False)
    report = biper_engine.verify(engine, model, x)
    rows = {segment.name: segment for segment in report.segments}
    assert rows["bmm"].accumulators == 2 * 3 * 7 * 7
    assert report.layers_equal == report.layers == 5


def test_heads_of_one_map_are_groups_of_its_bits() -> None:
    model = seeded(lambda: Heads(64, 2, sign))
    engine = biper_engine.convert(model, noise(2, 5, 64), check=False)
    scores, mixed = nodes_of(engine, "bmatmul_float")
    assert (scores.kwargs["groups"], scores.kwargs["channels"]) == (2, 64)
    assert (mixed.kwargs["groups"], mixed.kwargs["channels"]) == (1, 5)


@pytest.mark.some(1)
@pytest.mark.parametrize("tokens", [1, 33])
def test_any_number_of_tokens_gives_the_exact_products(tokens: int) -> None:
    model = seeded(lambda: Heads(6, 2, PROBABILITIES["compared"]))
    x = noise(2, tokens, 6)
    engine = converted(model, x)
    torch.testing.assert_close(engine(x), model(x), rtol=0, atol=0)  # sums of -1, 0 and 1


def test_signs_of_zero_are_counted() -> None:
    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.sign(a) @ torch.sign(b).transpose(1, 2)

    a, b, x = noise(2, 4, 40), noise(2, 3, 40, seed=1), noise(2, 8)
    a[0, 0, 0] = 0.0
    model = seeded(lambda: Two(product))
    engine = biper_engine.convert(model, (a, b, x), check=False)
    report = biper_engine.verify(engine, model, (a, b, x))
    assert report.ok
    assert report.exact_zeros == 1
    assert sum(segment.zero_outputs for segment in report.segments) == 3


LAYOUTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "matrices": (lambda a, b: sign(a) @ sign(b), (2, 5, 40), (2, 40, 7)),
    "transposed": (lambda a, b: sign(a).mT @ sign(b).mT, (2, 40, 5), (2, 7, 40)),
    "five dimensions": (lambda a, b: sign(a) @ sign(b), (2, 3, 2, 5, 8), (2, 3, 2, 8, 4)),
    "einsum": (
        lambda a, b: torch.einsum("nthd,nshd->nhts", sign(a), sign(b)),
        (2, 5, 3, 33),
        (2, 4, 3, 33),
    ),
    "moved after the sign": (
        lambda a, b: sign(a).permute(0, 2, 1, 3) @ sign(b).permute(0, 2, 3, 1),
        (2, 5, 3, 16),
        (2, 6, 3, 16),
    ),
    "thresholds per channel": (
        lambda a, b: sign(a - torch.linspace(-1, 1, 40)) @ sign(b.mT - 0.3).mT,
        (2, 5, 40),
        (2, 40, 7),
    ),
    "two pairs": (
        lambda a, b: torch.where(a > 0, 0.75, 0.25) @ torch.where(b > 0, 1.5, -0.25),
        (2, 5, 40),
        (2, 40, 7),
    ),
    "scaled": (lambda a, b: (sign(a) * 0.1) @ ((b > 0) * 3.0), (2, 5, 40), (2, 40, 7)),
}


@pytest.mark.some(2)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_a_product_is_packed(name: str) -> None:
    product, first, second = LAYOUTS[name]
    model = seeded(lambda: Two(product))
    inputs = (noise(*first), noise(*second, seed=1), noise(2, 8))
    engine = converted(model, *inputs)
    assert len(nodes_of(engine, "bmatmul_float")) == 1
    more = (noise(3, *first[1:]), noise(3, *second[1:], seed=1), noise(3, 8))
    for got, wanted in zip(engine(*more), model(*more), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_product_with_one_real_factor_stays_in_float() -> None:
    model = seeded(lambda: Two(lambda a, b: sign(a) @ b))
    inputs = (noise(2, 5, 40), noise(2, 40, 7), noise(2, 8))
    with pytest.warns(biper_engine.errors.UnconvertedWarning, match="right factor"):
        engine = biper_engine.convert(model, inputs)
    assert nodes_of(engine, "bmatmul_float") == []


def test_products_are_kept_by_name() -> None:
    model = seeded(lambda: Two(lambda a, b: sign(a) @ sign(b)))
    inputs = (noise(2, 5, 40), noise(2, 40, 7), noise(2, 8))
    engine = biper_engine.convert(model, inputs, keep_float=["bmm"], check=False)
    assert nodes_of(engine, "bmatmul_float") == []


def test_a_network_without_weights_says_so() -> None:
    class Gram(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            signs = torch.where(x >= 0, 1.0, -1.0).flatten(2)
            return signs @ signs.transpose(1, 2)

    images = torch.randn(2, 4, 5, 5)
    engine = biper_engine.convert(Gram(), images)
    torch.testing.assert_close(engine(images), Gram()(images))
    assert "the network has no weights, so no device" in engine.execution
