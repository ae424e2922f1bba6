"""Data sets by name, as tensors made by `preprocessing.image_to_tensor`.

`digits`: scikit-learn's 1,797 handwritten digits (UCI, 8x8 pixels of 17 grey levels), in the file's
own order, unshuffled: the first 1,297 are for training, the last 500 for the test. The last 297 of
the training images are the validation part, on which settings are chosen. The data is grouped by
writer, so both parts have writers that training has not seen; a random split would be easier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from biper_engine.metadata import Metadata
from biper_engine.preprocessing import image_to_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DataSet", "Part", "available", "digit_images", "load", "loader"]

DIGITS_METADATA = Metadata(
    input_size=(3, 32, 32),
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    class_names=tuple("0123456789"),
)
_DIGITS_TRAIN = 1297
_DIGITS_VALIDATION = 297


class Part(NamedTuple):
    """Images [N, C, H, W] float32 and labels [N] int64."""

    images: Tensor
    labels: Tensor

    def slice(self, start: int, stop: int) -> Part:
        """Return images start to stop - 1."""
        return Part(self.images[start:stop], self.labels[start:stop])


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set split for training.

    Attributes:
        train: all training images, the held-out ones included.
        validation_count: how many images at the end of `train` are the validation part.
        test: images for the final measurement only.
        metadata: the preprocessing that made the tensors, and the class names.
        num_classes: number of labels.
    """

    train: Part
    validation_count: int
    test: Part
    metadata: Metadata
    num_classes: int

    def without_validation(self) -> Part:
        """Return the training images that are not held out."""
        return self.train.slice(0, len(self.train.labels) - self.validation_count)

    def validation(self) -> Part:
        """Return the held-out training images."""
        count = len(self.train.labels)
        return self.train.slice(count - self.validation_count, count)


def available() -> tuple[str, ...]:
    """Return the names that `load` accepts."""
    return tuple(_DATASETS)


def load(name: str) -> DataSet:
    """Load a data set.

    Raises:
        ValueError: unknown name; the message has the closest match and every known name.
    """
    if name in _DATASETS:
        return _DATASETS[name]()
    close = get_close_matches(name, _DATASETS, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"Unknown dataset {name!r}.{hint} Known: {', '.join(_DATASETS)}.")


def digit_images() -> tuple[list[Image], list[int]]:
    """Return scikit-learn's digits as 8-bit grey PIL images of 8x8 pixels, and their labels.

    A pixel v in 0..16 becomes round(v * 255 / 16).
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(image) for image in pixels], [int(label) for label in digits.target]


def _load_digits() -> DataSet:
    images, labels = digit_images()
    tensors = torch.stack([image_to_tensor(image, DIGITS_METADATA) for image in images])
    everything = Part(tensors, torch.tensor(labels))
    return DataSet(
        train=everything.slice(0, _DIGITS_TRAIN),
        validation_count=_DIGITS_VALIDATION,
        test=everything.slice(_DIGITS_TRAIN, len(labels)),
        metadata=DIGITS_METADATA,
        num_classes=10,
    )


_DATASETS: dict[str, Callable[[], DataSet]] = {"digits": _load_digits}


def loader(part: Part, *, batch_size: int, shuffle_seed: int | None = None) -> DataLoader[Part]:
    """Iterate over a part in batches; a seed shuffles it and drops the incomplete last batch."""
    size = min(batch_size, len(part.labels))
    shuffle = shuffle_seed is not None
    order = _EpochOrder(len(part.labels), shuffle_seed) if shuffle_seed is not None else None
    return DataLoader(_Batches(part), size, sampler=order, drop_last=shuffle, collate_fn=_unchanged)


class _Batches(Dataset[Part]):
    """Index a whole batch at once: 1,297 single images and one stack cost ten times as much."""

    def __init__(self, part: Part) -> None:
        self._part = part

    def __len__(self) -> int:
        return len(self._part.labels)

    def __getitem__(self, index: int) -> Part:
        return Part(self._part.images[index], self._part.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> Part:
        return Part(self._part.images[indices], self._part.labels[indices])


def _unchanged(batch: Any) -> Any:
    return batch


class _EpochOrder(Sampler[int]):
    """A permutation that depends only on seed and epoch, so that a resumed run repeats it.

    Lightning calls `set_epoch` before each epoch.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(torch.randperm(self._count, generator=generator).tolist())
