"""Convert a small model and compare the engine with it in float64."""

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biper_engine.conversion import convert
from biper_engine.engine import Engine
from tests.conversion.foreign_models import seeded


class Functional(nn.Module):
    """A model given by its layers and its forward pass, `run(self, x)`."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def images_of(shape: tuple[int, ...], count: int = 4, seed: int = 3) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def convert_quietly(model: nn.Module, example: Any, **options: Any) -> Engine:
    return convert(model, example, **{"unconverted": "ignore", **options})


def converted(
    build: Callable[[], nn.Module], shape: tuple[int, ...], **options: Any
) -> tuple[Engine, nn.Module, Tensor]:
    """Build with fixed weights and convert; `convert` itself checks every segment."""
    model, images = seeded(build), images_of(shape)
    return convert_quietly(model, images[:2], **options), model, images


def assert_packed_exactly(
    shape: tuple[int, ...], layers: Mapping[str, Callable[[], nn.Module]], run: Callable[..., Any]
) -> None:
    """Convert a model of `Functional`; every layer must be packed, and exact in any batch."""
    engine, model, images = converted(
        lambda: Functional(run, **{key: build() for key, build in layers.items()}), shape
    )
    assert len(packed(engine)) == len(engine.report.layers)
    for batch in (images, images[:1], images_of(shape, 5, seed=9)):
        assert_exact(engine, model, batch)


def packed(engine: Engine) -> list[str]:
    return [row.name for row in engine.report.layers if row.packed]


def truth(model: nn.Module, images: Tensor) -> Tensor:
    """Return what the model computes in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            return copy.deepcopy(model).eval().double()(images.double())
    finally:
        torch.set_default_dtype(default)


def assert_close(engine: Engine, model: nn.Module, images: Tensor) -> None:
    """Require 2e-6 relative to the float64 model, on all images but one.

    Rounding of a few float32 layers stays below 2e-6; a bit whose value lies within rounding of its
    threshold may flip, and that image alone may be off.
    """
    expected, got = truth(model, images), engine(images).double()
    assert got.shape == expected.shape
    difference = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    close = int((difference <= 2e-6).sum())
    assert close >= len(images) - 1, f"relative errors {difference.tolist()}"


def assert_exact(engine: Engine, model: nn.Module, images: Tensor) -> None:
    """Require equality: every value of the model is a small integer or a half."""
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(images.clone())
    assert torch.equal(engine(images), expected)
