"""Layers: one-dimensional convolutions, patches and matrix products in all their spellings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conversion.comparison import assert_packed_exactly
from tests.conversion.foreign_models import where_ge


class Weight(nn.Module):
    """A latent weight; calling it gives its signs."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(sizes))

    def forward(self) -> Tensor:
        return torch.where(self.weight >= 0, 1.0, -1.0)


def ternary(weight: Tensor) -> Tensor:
    return torch.where(weight.abs() > 0.5, torch.sign(weight), 0.0)


def conv1d(s: Any, x: Tensor, **options: Any) -> Tensor:
    return F.conv1d(where_ge(x), s.w(), **options)


EXACT: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {
    "conv1d": ((6, 9), (8, 6, 3), lambda s, x: conv1d(s, x)),
    "conv1d, padded, strided, dilated": (
        (33, 20),
        (5, 33, 3),
        lambda s, x: conv1d(s, x, padding=3, stride=2, dilation=2),
    ),
    "conv1d of groups": (
        (64, 9),
        (6, 32, 2),
        lambda s, x: conv1d(s, x, groups=2, bias=torch.arange(6.0)),
    ),
    "conv1d, thresholds of channels, circular": (
        (6, 9),
        (8, 6, 3),
        lambda s, x: F.conv1d(
            F.pad(where_ge(x - torch.linspace(-1, 1, 6)[:, None]), (1, 1), mode="circular"), s.w()
        ),
    ),
    "conv1d after a max pool": (
        (6, 12),
        (8, 6, 3),
        lambda s, x: F.conv1d(F.max_pool1d(where_ge(x), 2), s.w(), padding=1),
    ),
    "conv1d of zeros and ones": (
        (6, 12),
        (8, 6, 3),
        lambda s, x: F.conv1d((x > 0).float(), ternary(s.w.weight), padding=1),
    ),
    "conv1d of height 1 by hand": (
        (6, 12),
        (8, 6, 1, 3),
        lambda s, x: F.conv2d(where_ge(x).unsqueeze(2), s.w(), padding=(0, 1)).squeeze(2),
    ),
    "the matrix before columns": (
        (4, 6, 7),
        (5, 36),
        lambda s, x: s.w() @ F.unfold(where_ge(x), 3, padding=1),
    ),
    "columns, turned": (
        (4, 6, 7),
        (5, 24),
        lambda s, x: F.unfold(where_ge(x), (2, 3), padding=(0, 1)).transpose(1, 2) @ s.w().t(),
    ),
    "columns in einsum": (
        (4, 7, 7),
        (5, 36),
        lambda s, x: torch.einsum(
            "ok,nkl->nol", s.w(), F.unfold(where_ge(x), 3, dilation=2, stride=2)
        ),
    ),
    "columns in einsum, at the end": (
        (4, 6, 6),
        (36, 5),
        lambda s, x: torch.einsum("nkl,ko->nlo", F.unfold(where_ge(x), 3, padding=1), s.w()),
    ),
    "patches": (
        (4, 6, 6),
        (5, 4, 3, 3),
        lambda s, x: torch.einsum(
            "nchwij,ocij->nohw", where_ge(x).unfold(2, 3, 1).unfold(3, 3, 1), s.w()
        ),
    ),
    "einsum of maps": (
        (6, 4, 5),
        (5, 6),
        lambda s, x: torch.einsum("nchw,oc->nohw", where_ge(x), s.w()),
    ),
    "einsum of tokens": (
        (7, 6),
        (6, 5),
        lambda s, x: torch.einsum("ntc,co->nto", where_ge(x), s.w()),
    ),
    "tensordot": (
        (6, 4, 5),
        (6, 5),
        lambda s, x: torch.tensordot(where_ge(x), s.w(), dims=([1], [0])),
    ),
    "a matrix before turned rows": ((6,), (5, 6), lambda s, x: (s.w() @ where_ge(x).t()).t()),
    "a matrix before maps": ((3, 6, 4), (5, 6), lambda s, x: s.w() @ where_ge(x)),
    "matmul of maps": ((3, 4, 6), (6, 5), lambda s, x: where_ge(x) @ s.w()),
    "inner": ((7, 6), (5, 6), lambda s, x: torch.inner(where_ge(x), s.w())),
    "a vector": ((33,), (33,), lambda s, x: where_ge(x) @ s.w()),
    "addmm": (
        (33,),
        (33, 5),
        lambda s, x: torch.addmm(torch.arange(5.0), where_ge(x), s.w(), beta=2, alpha=0.5),
    ),
    "heads of 32 features": (
        (3, 32),
        (3, 32, 5),
        lambda s, x: torch.einsum("nhk,hko->nho", where_ge(x), s.w()),
    ),
    "heads first": (
        (3, 32),
        (3, 32, 5),
        lambda s, x: torch.bmm(where_ge(x).transpose(0, 1), s.w()).transpose(0, 1),
    ),
    "heads of several rows": (
        (3, 4, 32),
        (3, 32, 5),
        lambda s, x: where_ge(x) @ s.w(),
    ),
    "heads of signs with thresholds of their own": (
        (3, 4, 32),
        (3, 32, 5),
        lambda s, x: where_ge(x - torch.linspace(-1, 1, 32)) @ s.w(),
    ),
}


@pytest.mark.some(3)
@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    shape, sizes, run = EXACT[name]
    assert_packed_exactly(shape, {"w": lambda: Weight(*sizes)}, run)


TRANSPOSED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "no stride": ((8, 5, 3, 3), {}),
    "stride 2, kernel 4": ((8, 5, 4, 4), {"stride": 2, "padding": 1}),
    "stride 2, kernel 3": ((8, 5, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "stride 2, kernel 2": ((8, 5, 2, 2), {"stride": 2}),
    "stride above the kernel": ((8, 5, 1, 2), {"stride": (3, 3)}),
    "cropped": ((8, 5, 3, 5), {"stride": (1, 2), "padding": (2, 3)}),
    "dilated": ((8, 5, 3, 3), {"stride": (2, 3), "dilation": (2, 2), "padding": (1, 2)}),
    "dilated by 3": ((8, 5, 4, 2), {"stride": 2, "dilation": 3, "padding": 1, "output_padding": 1}),
    "groups": ((64, 5, 3, 3), {"stride": 2, "groups": 2, "padding": 1}),
}


@pytest.mark.some(3)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed(name: str, bias: bool) -> None:
    sizes, options = TRANSPOSED[name]
    outputs = sizes[1] * options.get("groups", 1)
    offset = torch.arange(outputs) * 0.5 if bias else None

    def run(s: Any, x: Tensor) -> Tensor:
        return F.conv_transpose2d(where_ge(x), s.w(), offset, **options)

    assert_packed_exactly((sizes[0], 5, 4), {"w": lambda: Weight(*sizes)}, run)


MORE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "one dimension": lambda s, x: F.conv_transpose1d(
        where_ge(x.flatten(2)), s.w()[:, :, 0], stride=2, padding=1, output_padding=1
    ),
    "zeros and ones": lambda s, x: F.conv_transpose2d((x > 0).float(), s.w(), stride=2, padding=1),
    "ternary weights": lambda s, x: F.conv_transpose2d(
        where_ge(x), ternary(s.w.weight), stride=2, padding=1
    ),
    "ternary activations": lambda s, x: F.conv_transpose2d(
        torch.sign(x.round()), s.w(), stride=(2, 1)
    ),
    "a norm and a sign behind": lambda s, x: F.conv2d(
        where_ge(F.conv_transpose2d(where_ge(x), s.w(), stride=2) * 0.5 - 0.25),
        s.w()[:5, :5],
    ),
}


@pytest.mark.some(3)
@pytest.mark.parametrize("name", MORE)
def test_more_of_transposed(name: str) -> None:
    assert_packed_exactly((8, 5, 4), {"w": lambda: Weight(8, 5, 3, 3)}, MORE[name])
