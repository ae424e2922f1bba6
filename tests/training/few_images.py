"""A data set so small that an epoch takes almost no time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from biper_engine.training import data


@contextmanager
def few_images() -> Iterator[None]:
    """Put 48 + 16 images of 8x8 noise in the place of the digits."""
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(64) % 10
    small = data.DataSet(
        train=data.Part(images[:48], labels[:48]),
        validation_count=16,
        test=data.Part(images[48:], labels[48:]),
        metadata=data.DIGITS_METADATA,
        num_classes=10,
    )
    with mock.patch.dict(data._DATASETS, digits=lambda: small):
        yield
