"""Whole networks in the idioms of public code, under any names."""

import random
import string
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.conversion import verify
from tests.conversion.comparison import (
    assert_close,
    assert_exact,
    convert_quietly,
    converted,
    images_of,
    packed,
)
from tests.conversion.foreign_models import (
    SIGNS,
    BinaryMLP,
    BinaryNet,
    BiRealNet,
    BufferBranch,
    Flattened,
    ReActNet,
    SmallNet,
    XNORNet,
    seeded,
)

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "buffer branch": (BufferBranch, (4, 8, 8), 1),
    "BinaryNet": (BinaryNet, (3, 8, 8), 2),
    "ReActNet": (ReActNet, (3, 8, 8), 5),
    "Bi-Real Net": (BiRealNet, (3, 8, 8), 3),
    "XNOR-Net": (XNORNet, (3, 8, 8), 1),  # and one with groups of 8, faster in float
    "binary MLP": (BinaryMLP, (3, 8, 8), 3),
    "sign, flatten": (lambda: Flattened(True), (3, 8, 8), 2),
    "flatten, sign": (lambda: Flattened(False), (3, 8, 8), 2),
}


@pytest.mark.some(2)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_other_people(name: str) -> None:
    build, shape, count = NETWORKS[name]
    engine, model, images = converted(build, shape)
    assert len(packed(engine)) == count, engine.report.table()
    assert_close(engine, model, images)
    assert engine(images[:1]).shape == (1, *engine(images).shape[1:])


@pytest.mark.deep
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_other_people_verify(name: str) -> None:
    build, shape, _ = NETWORKS[name]
    report = verify(*converted(build, shape, check=False))
    assert report.ok, report.table()


# -- names mean nothing ---------------------------------------------------------------------------


class Names:
    """Draws identifiers: some random, some chosen to mislead."""

    MISLEADING = (
        "relu",
        "float_conv",
        "stem",
        "fc",
        "bn",
        "sign",
        "constants",
        "input",
        "residual",
    )

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._misleading = list(self.MISLEADING)
        self._random.shuffle(self._misleading)

    def __call__(self) -> str:
        if self._misleading and self._random.random() < 0.4:
            return self._misleading.pop()
        return "".join(self._random.choices(string.ascii_letters, k=9))


def convolution(name: Names, inputs: int, outputs: int, kernel: int, sign: Any) -> nn.Module:
    """A layer that is no nn.Conv2d, with a latent weight and scale under drawn names."""
    weight, scale = name(), name()

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        binary = torch.where(getattr(self, weight) >= 0, 1.0, -1.0)
        return F.conv2d(sign(x), binary, padding=kernel // 2) * getattr(self, scale)

    layer = type(name(), (nn.Module,), {"forward": forward})()
    layer.register_parameter(weight, nn.Parameter(torch.randn(outputs, inputs, kernel, kernel)))
    layer.register_parameter(scale, nn.Parameter(torch.randn(outputs, 1, 1) * 0.1))
    return layer


def network(seed: int) -> nn.Module:
    """Stem, two binary convolutions with a shortcut, classifier; every name drawn."""
    name = Names(seed)
    sign = SIGNS[random.Random(seed).choice(["sign", "where_ge", "arithmetic", "masked_write"])]
    parts = {
        "stem": nn.Conv2d(3, 6, 3, padding=1),
        "norm": nn.BatchNorm2d(6),
        "first": convolution(name, 6, 6, 3, sign),
        "norm1": nn.BatchNorm2d(6),
        "second": convolution(name, 6, 6, 1, sign),
        "norm2": nn.BatchNorm2d(6),
        "last": nn.Linear(6, 4),
    }
    names = {part: name() for part in parts}

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        def run(part: str, value: Tensor) -> Tensor:
            return getattr(self, names[part])(value)

        x = F.hardtanh(run("norm", run("stem", x)))
        x = F.hardtanh(run("norm1", run("first", x)) + x, inplace=True)
        x = F.hardtanh(run("norm2", run("second", x)) + x, inplace=True)
        return run("last", x.mean((2, 3)))

    whole = type(name(), (nn.Module,), {"forward": forward})()
    for part, module in parts.items():
        whole.add_module(names[part], module)
    return whole


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("seed", "wrapped"),
    [
        *((0, False), (1, True)),
        *(pytest.param(seed, seed % 3 > 0, marks=pytest.mark.weekly) for seed in range(2, 20)),
    ],
)
def test_names_and_wrapping_do_not_matter(seed: int, wrapped: bool) -> None:
    def build() -> nn.Module:
        model = network(seed)
        return nn.Sequential(model) if wrapped else model

    engine, model, images = converted(build, (3, 6, 6))
    assert [row.packed for row in engine.report.layers] == [False, True, True, False]
    assert_close(engine, model, images)


def test_a_wrapped_network_gives_the_same_engine() -> None:
    model = seeded(SmallNet)
    images = images_of((3, 8, 8))
    plain = convert_quietly(model, images)
    wrapped = convert_quietly(nn.Sequential(nn.Sequential(model)), images)
    assert [f"0.0.{name}" for name in packed(plain)] == packed(wrapped)
    assert torch.equal(plain(images), wrapped(images))


def test_flipped_images_are_other_images() -> None:
    """A check of these checks: the comparison sees a difference where there is one."""
    engine, model, images = converted(BufferBranch, (4, 8, 8))
    with pytest.raises(AssertionError):
        assert_exact(lambda x: engine(x.flip(3)), model, images)  # type: ignore[arg-type]
