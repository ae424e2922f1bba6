"""Recipes for rivals: how to make one, what it must agree with, and its networks and files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, fx, nn

from biper_engine.bench.rivals.onnx_files import export_float, quantize
from biper_engine.bench.rivals.rival import Rival, check_images, checked, first_line, missing
from biper_engine.conversion.twin import float_twin, folded_network

__all__ = ["TWIN", "FloatNetworks", "Network", "OnnxFiles", "Recipe", "rival_of"]

TWIN = "the float twin"

_FAILURES = (RuntimeError, ValueError, OSError)


@dataclass(frozen=True)
class FloatNetworks:
    """A model as graphs with constants folded.

    Attributes:
        network: what the model computes, including the signs of activations.
        twin: the same layers in float, without those signs.
    """

    network: fx.GraphModule
    twin: fx.GraphModule

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> FloatNetworks:
        """Make both; not in `torch.inference_mode`, because PyTorch cannot compile its tensors.

        Raises:
            ConversionError: the model cannot be captured.
        """
        return cls(network=folded_network(model, images), twin=float_twin(model, images))


class Network(Protocol):
    """A network that a runtime has loaded."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return outputs for images."""
        ...

    def bind(self, images: Tensor) -> Callable[[], Any]:
        """Return a call on images without arguments, which is timed."""
        ...

    def kernels(self) -> dict[str, int]:
        """Return how many nodes each kind of kernel runs; empty if the runtime does not tell."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make a rival, and what it must agree with.

    Attributes:
        name, how: as in `Rival`.
        modules: the modules that it imports.
        make: loads or compiles it.
        wanted, beside: as in `Rival`.
        share: share of the images that must agree; None if answers are only compared.
        rest_ms: as in `Rival`.
    """

    name: str
    how: str
    modules: tuple[str, ...]
    make: Callable[[], Network]
    wanted: Callable[[Tensor], Tensor]
    beside: str = TWIN
    share: float | None = None
    rest_ms: float = 0.0


def rival_of(recipe: Recipe, images: Tensor) -> Rival:
    """Make a rival for a batch and check it if it must agree, or give the reason why it cannot run.

    Args:
        recipe: how to make it.
        images: the batch.
    """
    rival = Rival(
        name=recipe.name,
        how=recipe.how,
        wanted=recipe.wanted,
        beside=recipe.beside,
        rest_ms=recipe.rest_ms,
    )
    reason = missing(*recipe.modules)
    if reason:
        return replace(rival, reason=reason)
    try:
        network = recipe.make()
        network(images)
    except _FAILURES as error:
        return replace(rival, reason=first_line(error))
    rival = replace(rival, call=network, bind=network.bind, kernels=network.kernels())
    if recipe.share is None:
        return rival
    return checked(rival, check_images(images), share=recipe.share)


class OnnxFiles:
    """ONNX files of the float twin in a folder, each written when it is first needed."""

    def __init__(self, folder: Path, twin: fx.GraphModule, images: Tensor) -> None:
        self._folder, self._twin, self._images = folder, twin, images

    def outputs(self, images: Tensor) -> Tensor:
        """Return PyTorch's outputs, which the files must compute, too."""
        result: Tensor = self._twin(images)[0]
        return result

    @cached_property
    def float32(self) -> Path:
        path = self._folder / "float32.onnx"
        export_float(self._twin, self._images, path)
        return path

    @cached_property
    def int8(self) -> Path:
        path = self._folder / "int8.onnx"
        quantize(self.float32, path, tuple(self._images.shape))
        return path
