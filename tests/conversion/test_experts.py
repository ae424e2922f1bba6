"""Weights chosen or mixed for each image: the images of a batch are the groups of a convolution."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from biper_engine import convert, load
from biper_engine.errors import ConversionError

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS, CHANNELS, OUTPUTS = 3, 8, 6


def sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def chosen(gate: Tensor, weights: Tensor) -> Tensor:
    """Take the weights of the likeliest expert, by a product with its one-hot vector."""
    first = functional.one_hot(gate.argmax(1), EXPERTS).to(weights.dtype)
    return sign((first @ weights.flatten(1)).view(-1, *weights.shape[1:]))


def indexed(gate: Tensor, weights: Tensor) -> Tensor:
    return sign(weights[gate.argmax(1)])


def mixed(gate: Tensor, weights: Tensor) -> Tensor:
    """Take the signs of a mixture of all experts' weights."""
    return sign(torch.einsum("be,eocij->bocij", gate.softmax(1), weights))


def scaled(gate: Tensor, weights: Tensor) -> Tensor:
    """Take the signs of the likeliest expert's weights, times their mean size."""
    own = weights[gate.argmax(1)]
    return sign(own) * own.abs().mean((2, 3, 4), keepdim=True)


def picked(gate: Tensor, weights: Tensor) -> Tensor:
    """Index the signs of all experts."""
    return sign(weights)[gate.argmax(1)]


def selected(gate: Tensor, weights: Tensor) -> Tensor:
    return torch.index_select(sign(weights), 0, gate.argmax(1))


def embedded(gate: Tensor, weights: Tensor) -> Tensor:
    signs = functional.embedding(gate.argmax(1), sign(weights).flatten(1))
    return signs.view(-1, *weights.shape[1:])


def gathered(gate: Tensor, weights: Tensor) -> Tensor:
    signs = torch.take_along_dim(sign(weights).flatten(1), gate.argmax(1)[:, None], 0)
    return signs.view(-1, *weights.shape[1:])


class Experts(nn.Module):
    def __init__(
        self,
        choose: Callable[..., Tensor],
        groups: int = 1,
        has_bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(CHANNELS, EXPERTS)
        self.weight = nn.Parameter(torch.randn(EXPERTS, OUTPUTS, CHANNELS // groups, 3, 3))
        self.bias = nn.Parameter(torch.randn(OUTPUTS))
        self.choose, self.groups, self.options = choose, groups, options
        self.has_bias = has_bias

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        weight = self.choose(self.gate(x.mean((2, 3))), self.weight).flatten(0, 1)
        images = sign(x).reshape(1, -1, height, width)
        bias = self.bias.repeat(batch) if self.has_bias else None
        y = functional.conv2d(images, weight, bias, groups=batch * self.groups, **self.options)
        return y.view(batch, OUTPUTS, *y.shape[2:]).relu()


def model_of(choose: Callable[..., Tensor], **options: Any) -> Experts:
    torch.manual_seed(0)
    return Experts(choose, **options).eval()


@pytest.mark.some(2)
@pytest.mark.parametrize(
    "choose", [chosen, indexed, mixed, scaled, picked, selected, embedded, gathered]
)
def test_the_products_are_on_bits(choose: Callable[..., Tensor], tmp_path: Path) -> None:
    model = model_of(choose)
    images = torch.randn(5, CHANNELS, 7, 6)
    engine = convert(model, images[:2], unconverted="ignore")  # which verifies it
    assert engine.report.packed == 1
    for batch in (1, 2, 5):
        torch.testing.assert_close(engine(images[:batch]), model(images[:batch]))
    engine.save(tmp_path / "experts.biper")
    assert torch.equal(load(tmp_path / "experts.biper")(images), engine(images))


@pytest.mark.some(1)
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "stride": 2},
        {"padding": (1, 0), "stride": (1, 2), "dilation": 2},
        {"padding": "same", "dilation": (1, 2)},
        {"padding": "valid", "has_bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("groups", [1, 2])
def test_geometries_are_those_of_a_convolution(options: dict[str, Any], groups: int) -> None:
    model = model_of(chosen, groups=groups, **options)
    images = torch.randn(4, CHANNELS, 7, 6)
    engine = convert(model, images[:2], unconverted="ignore")
    assert engine.report.packed >= 1
    for batch in (1, 4):
        torch.testing.assert_close(engine(images[:batch]), model(images[:batch]))


def test_half_a_window_more_at_one_side_is_computed_in_float() -> None:
    class Even(Experts):
        def __init__(self) -> None:
            super().__init__(chosen, padding="same")
            self.weight = nn.Parameter(torch.randn(EXPERTS, OUTPUTS, CHANNELS, 2, 4))
            self.after = nn.Parameter(torch.randn(4, OUTPUTS, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return functional.conv2d(sign(super().forward(x) - 1), sign(self.after))

    torch.manual_seed(0)
    model = Even().eval()
    images = torch.randn(4, CHANNELS, 7, 6)
    engine = convert(model, images[:2], unconverted="ignore")
    for batch in (1, 4):
        torch.testing.assert_close(engine(images[:batch]), model(images[:batch]))


def test_groups_that_are_fixed_stay_a_convolution() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 2, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return functional.conv2d(sign(x), sign(self.weight), groups=4, padding=1)

    engine = convert(Fixed().eval(), torch.randn(2, 8, 6, 6), unconverted="ignore", check=False)
    assert [row.kind for row in engine.report.layers] == ["conv2d"]


def test_groups_of_another_kind_of_convolution_name_the_model() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 1, 3))

        def forward(self, x: Tensor) -> Tensor:
            weight = sign(self.weight).repeat(x.shape[0], 1, 1)
            rows = sign(x).reshape(1, -1, 8)
            return functional.conv1d(rows, weight, groups=4 * x.shape[0]).view(-1, 4, 6)

    with pytest.raises(ConversionError, match="branches on the batch size in") as caught:
        convert(Rows().eval(), torch.randn(2, 4, 8))
    assert "contextlib" not in str(caught.value)


@pytest.mark.some(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_keep_what_the_model_gives(dtype: torch.dtype) -> None:
    class Typed(Experts):
        def forward(self, x: Tensor) -> Tensor:
            batch = x.shape[0]
            weight = indexed(self.gate(x.mean((2, 3))), self.weight).to(dtype).flatten(0, 1)
            images = sign(x).to(dtype).reshape(1, -1, *x.shape[2:])
            y = functional.conv2d(images, weight, groups=batch, padding=1)
            return functional.linear(sign(y.view(batch, -1)).float(), sign(self.after))

    torch.manual_seed(0)
    model = Typed(indexed)
    model.after = nn.Parameter(torch.randn(4, OUTPUTS * 42))
    images = torch.randn(4, CHANNELS, 7, 6)
    engine = convert(model.eval(), images[:2], unconverted="ignore")
    for batch in (1, 4):
        torch.testing.assert_close(engine(images[:batch]), model(images[:batch]))


def test_groups_of_several_images_each_are_refused() -> None:
    class Pairs(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weight = indexed(self.gate(x.mean((2, 3))), self.weight).flatten(0, 1)
            images = sign(x).reshape(1, -1, *x.shape[2:]).repeat(2, 1, 1, 1)
            y = functional.conv2d(images, weight, groups=x.shape[0])
            return y.mean(0).view(x.shape[0], OUTPUTS, *y.shape[2:])

    with pytest.raises(ConversionError):
        convert(Pairs(indexed).eval(), torch.randn(2, CHANNELS, 7, 6))
