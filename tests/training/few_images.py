"""A data set so small that an epoch takes almost no time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from biper_engine.training import data
from biper_engine.training.examples import MemoryExamples


@contextmanager
def few_images(size: int = 8) -> Iterator[None]:
    """Put 48 + 16 images of noise, 8x8 unless said otherwise, in the place of the digits."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 1, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(64) % 10
    small = data.DataSet(
        train=MemoryExamples(pixels[:48], labels[:48]),
        validation=tuple(range(32, 48)),
        test=MemoryExamples(pixels[48:], labels[48:]),
        metadata=data.DIGITS_METADATA,
        num_classes=10,
    )
    with mock.patch.dict(data._DATASETS, digits=lambda config, task: small):
        yield
