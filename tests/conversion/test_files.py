"""What people write around binary layers: converted, saved, loaded, and equal for every batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biper_engine
from biper_engine.graph.structure import flatten_structure

Function = Callable[[Tensor], Any]


class Around(nn.Module):
    """A binary convolution, and functions of its map [N, 8, 6, 4]."""

    def __init__(self, functions: dict[str, Function]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.functions = functions

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = F.conv2d(torch.sign(x), torch.sign(self.weight), padding=1) * 0.1
        return {name: function(y) for name, function in self.functions.items()}


def _written(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, torch.tensor([1, 4])] = 0.0
    y[:, ::2, 0] = y[:, 1::2, 1]
    y[y > 2] = 0.5
    return y


def _attended(y: Tensor) -> Tensor:
    tokens = y.flatten(2).transpose(1, 2)
    heads = tokens.unflatten(2, (4, 2)).transpose(1, 2)
    grouped = F.scaled_dot_product_attention(heads, heads[:, :2], heads[:, :2], enable_gqa=True)
    return grouped.sum(1) + F.scaled_dot_product_attention(tokens, tokens, tokens)[..., :2]


def _doubled(y: Tensor) -> Tensor:
    both = torch.cat([y, y * 2])
    first, second = both.split(y.size(0))
    return first + second + both[y.size(0) :] + both.chunk(2)[0]


GROUPS: dict[str, dict[str, Function]] = {
    "order": {
        "topk": lambda y: y.flatten(1).topk(5),
        "sort": lambda y: torch.sort(y, dim=1, stable=True),
        "scans": lambda y: (y.cummax(1), y.logcumsumexp(2), (y > 0).cumsum(3)),
        "one": lambda y: (y.kthvalue(3, 1), y.median(1), y.round().mode(1), y.aminmax(dim=1)),
        "places": lambda y: torch.bucketize(y, torch.tensor([-0.5, 0.5])),
        "statistics": lambda y: (torch.std_mean(y, (2, 3)), y.nanmean((2, 3))),
        "counts": lambda y: ((y > 0).any((1, 2)), (y > 0).count_nonzero((2, 3))),
    },
    "writes": {
        "scatter": lambda y: torch.zeros_like(y).scatter_add(1, y.argmax(1, True), y[:, :1]),
        "reduce": lambda y: torch.zeros_like(y).scatter_reduce(
            1, y.argmax(1, True), y[:, :1], "amax"
        ),
        "index": lambda y: y.index_copy(1, torch.tensor([3, 0]), y[:, 5:7]),
        "written": _written,
        "unpool": lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
        "take": lambda y: torch.take_along_dim(y, y.argmax(1, keepdim=True), 1),
        "one_hot": lambda y: F.one_hot(y.argmax(1), 8).float(),
    },
    "sizes": {
        "repeat": lambda y: torch.eye(2).view(1, 4).repeat(y.size(0), 1) + y[:, 0, 0],
        "doubled": _doubled,
        "zeros": lambda y: torch.zeros(y.size(0) * 2, 1) + y.mean((2, 3)).repeat(2, 1)[:, :1],
        "rows": lambda y: y[torch.arange(y.size(0)), y.mean((2, 3)).argmax(1)],
        "mixed": lambda y: torch.eye(y.size(0)) @ y.mean((2, 3)) + y.size(0),
    },
    "numbers": {
        "integers": lambda y: ((y * 9).int() * 3 // 4, (y * 9).long() << 1, (y * 3).long() ** 2),
        "quantized": lambda y: F.relu(torch.fake_quantize_per_tensor_affine(y, 0.1, 3, 0, 255)),
        "functions": lambda y: torch.xlogy(y, y.abs()) + torch.logaddexp(y, y.erfinv()),
        "losses": lambda y: F.smooth_l1_loss(y, y * 2, reduction="none"),
        "distances": lambda y: torch.cdist(y.flatten(2), y.flatten(2).flip(1)),
        "matrices": lambda y: (torch.rot90(y, 1, (2, 3)), torch.diag_embed(y.mean((2, 3)))),
        "attention": _attended,
        "smaller": lambda y: F.interpolate(y, size=(3, 3), mode="bilinear", antialias=True),
    },
}


@pytest.mark.some(1)
@pytest.mark.parametrize("group", GROUPS)
def test_networks_are_equal_after_loading(group: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Around(GROUPS[group]).eval()
    engine = biper_engine.convert(model, torch.randn(2, 3, 6, 4), unconverted="ignore")
    engine.save(tmp_path / "net.biper")
    loaded = biper_engine.load(tmp_path / "net.biper")
    for batch in (1, 3):
        x = torch.randn(batch, 3, 6, 4)
        with torch.no_grad():
            wanted, got, again = (flatten_structure(net(x)) for net in (model, engine, loaded))
        assert wanted[1] == got[1] == again[1]
        for a, b, c in zip(wanted[0], got[0], again[0], strict=True):
            torch.testing.assert_close(b, a, equal_nan=True)
            torch.testing.assert_close(c, b, rtol=0, atol=0, equal_nan=True)


class Sequences(nn.Module):
    """Attention over sequences whose batch is the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Any:
        y = (torch.sign(x) @ torch.sign(self.weight) * 0.1).transpose(0, 1)
        return self.attention(y, y, y)


def test_attention_of_a_transposed_batch_is_captured() -> None:
    torch.manual_seed(0)
    model, x = Sequences().eval(), torch.randn(3, 5, 8)
    engine = biper_engine.convert(model, x[:2], unconverted="ignore")
    with torch.no_grad():
        for wanted, got in zip(model(x), engine(x), strict=True):
            torch.testing.assert_close(got, wanted)
