"""Engines in a soak test: a network, its images, and their results at the start."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import biper_engine
from biper_engine import Engine, UnconvertedWarning
from biper_engine.cli.sources import random_network

# What a batch may have at most, so that its maps stay some megabytes.
PIXELS = 80 * 32 * 32
IMAGES = 8
SIZES_BY_OPERATOR = (1, 2, 7, 20)
LAYOUTS = ("contiguous", "channels_last", "strided")
WEIGHTS = ("converted", "reloaded")


class DifferenceError(Exception):
    """A call gave other bytes than at the start."""


@dataclass(frozen=True)
class Batch:
    """Images of one call, by their numbers, and how they lie in memory."""

    images: tuple[int, ...]
    layout: str

    def __str__(self) -> str:
        return f"a batch of {len(self.images)}, {self.layout}"


def difference(got: Tensor, wanted: Tensor) -> str | None:
    """Say which rows of `got` [N, classes] have other bytes than those of `wanted`; None if none.

    Bytes, so that NaN equals itself and -0.0 is not 0.0.
    """
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{got.dtype} {list(got.shape)} instead of {wanted.dtype} {list(wanted.shape)}"
    other = got.contiguous().view(torch.uint8) != wanted.contiguous().view(torch.uint8)
    rows = other.flatten(1).any(1).nonzero().flatten().tolist()
    if not rows:
        return None
    far = (got.double() - wanted.double()).abs().max().item()
    return f"rows {rows[:8]} of {len(got)} differ, by up to {far:.3g}"


class Subject:
    """An engine that threads share, its file, and the logits that each image must give.

    A native program gives an image the same bytes alone or in any batch, in any layout and by any
    number of threads. PyTorch's float layers promise no such thing, so where a network runs
    operator by operator, each batch is compared with itself: a size has fixed images, and there are
    logits of each size, layout and number of threads.

    Args:
        name: of the registry, with `@float16` or `@bfloat16` behind it for such a stream.
        folder: where the engine's file is written.
        threads: numbers of torch's threads that calls will be made with.
    """

    def __init__(self, name: str, folder: Path, threads: tuple[int, ...]) -> None:
        network, _, dtype = name.partition("@")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnconvertedWarning)
            self.engine = biper_engine.convert(
                random_network(network),
                compute_dtype=getattr(torch, dtype or "float32"),
                check=False,
            )
        self.name = name
        self.native = self.engine.execution.startswith("one native program")
        self.path = folder / f"{name.replace('/', '-')}.biper"
        self.engine.save(self.path)
        shape = self.engine.input_shape
        most = max(1, PIXELS // math.prod(shape[1:]))
        self._sizes = [size for size in SIZES_BY_OPERATOR if size <= most]
        self._largest = most if self.native else self._sizes[-1]
        self.images = torch.randn(IMAGES, *shape, generator=torch.Generator().manual_seed(0))
        self.states = dict(
            zip(WEIGHTS, (self.engine.state_dict(), self._other_state()), strict=True)
        )
        self._wanted = {weights: self._logits(weights, threads) for weights in WEIGHTS}

    def _other_state(self) -> dict[str, Tensor]:
        """Return weights whose convolutions have their filters in the reverse order."""
        state = self.engine.state_dict()
        return {
            key: value.flip(0) if value.dtype == torch.int32 and value.dim() == 4 else value.clone()
            for key, value in state.items()
        }

    def _logits(self, weights: str, threads: tuple[int, ...]) -> dict[tuple[object, ...], Tensor]:
        engine = biper_engine.load(self.path)
        engine.load_state_dict(self.states[weights])
        if self.native:
            return {(): torch.cat([engine(image) for image in self.images.split(1)])}
        logits = {}
        for count in threads:
            torch.set_num_threads(count)
            for size in self._sizes:
                for layout in LAYOUTS:
                    batch = self._fixed(size, layout)
                    logits[count, size, layout] = engine(self.input(batch))
        return logits

    def _fixed(self, size: int, layout: str) -> Batch:
        return Batch(tuple(i % IMAGES for i in range(size)), layout)

    def draw(self, rng: random.Random, *, largest: bool = False) -> Batch:
        """Return a batch: small sizes as often as large ones, or the largest."""
        layout = rng.choice(LAYOUTS)
        if not self.native:
            return self._fixed(self._largest if largest else rng.choice(self._sizes), layout)
        size = self._largest if largest else round(self._largest ** rng.random())
        return Batch(tuple(rng.choices(range(IMAGES), k=size)), layout)

    def input(self, batch: Batch) -> Tensor:
        """Return the tensor that `batch` stands for."""
        images = self.images[list(batch.images)]
        if batch.layout == "channels_last":
            return images.contiguous(memory_format=torch.channels_last)
        if batch.layout == "strided":
            return torch.stack((images, images), dim=-1)[..., 0]
        return images

    def check(
        self, batch: Batch, logits: Tensor, weights: str = WEIGHTS[0], threads: int | None = None
    ) -> None:
        """Compare the logits of a call made with so many of torch's threads, else as many as here.

        Raises:
            DifferenceError: they have other bytes than at the start.
        """
        if self.native:
            wanted = self._wanted[weights][()][list(batch.images)]
        else:
            size = len(batch.images)
            count = threads or torch.get_num_threads()
            wanted = self._wanted[weights][count, size, batch.layout]
        found = difference(logits, wanted)
        if found is not None:
            raise DifferenceError(f"{self.name}, {weights} weights, {batch}: {found}")

    def call(self, engine: Engine, rng: random.Random, weights: str = WEIGHTS[0]) -> None:
        """Draw a batch, run it and check it.

        Raises:
            DifferenceError: the logits have other bytes than at the start.
        """
        batch = self.draw(rng)
        self.check(batch, engine(self.input(batch)), weights)
