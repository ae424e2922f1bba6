"""Labelled images of any origin, read one by one or held in memory as bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from biper_engine.errors import DataError
from biper_engine.metadata import Metadata
from biper_engine.preprocessing import image_to_pixels, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Examples",
    "FileExamples",
    "ForeignExamples",
    "MemoryExamples",
    "Selection",
    "as_image",
    "counted_classes",
    "in_memory",
    "select",
    "whole_label",
]


class Examples(ABC):
    """Images and labels by index. Must be picklable, for worker processes.

    Attributes:
        is_foreign: whether the items come from code of the user.
    """

    is_foreign = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[Image | Tensor, int]:
        """Return image and label.

        Returns:
            A PIL image, or a [C, H, W] tensor: uint8, or float if it is prepared already.

        Raises:
            ValueError: the image cannot be read; the message has its name.
        """

    def labels(self) -> Tensor | None:
        """Return all labels [N] int64, or None where each must be read with its image."""
        return None


class MemoryExamples(Examples):
    """Images in the size that the network takes.

    Args:
        pixels: [N, C, H, W] uint8, C = 1 or 3.
        labels: [N] int64.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels = pixels
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], int(self._labels[index])

    def labels(self) -> Tensor:
        return self._labels


class FileExamples(Examples):
    """Image files, each read when it is needed."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self._paths = [str(path) for path in paths]
        self._labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> tuple[Image, int]:
        return open_image(self._paths[index]), int(self._labels[index])

    def labels(self) -> Tensor:
        return self._labels


class ForeignExamples(Examples):
    """A `torch.utils.data.Dataset` whose items are (image, label).

    Its `targets`, if it has such an attribute, are the labels, as in torchvision's data sets.
    """

    is_foreign = True

    def __init__(self, dataset: Dataset[Any]) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise DataError(
                f"`{type(dataset).__name__}` has no length or no items by index, which training in "
                "a repeatable order needs. Give it __len__ and __getitem__."
            )
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type, unused-ignore]

    def read(self, index: int) -> tuple[Image | Tensor, int]:
        item = self._dataset[index]
        if not (isinstance(item, Sequence) and len(item) == 2):
            raise DataError(
                f"Item {index} of `{type(self._dataset).__name__}` is a {type(item).__name__}, "
                "wanted a pair: image and label."
            )
        image, label = item
        where = f"Item {index} of `{type(self._dataset).__name__}`"
        return _checked_image(image, where), whole_label(label, where)

    def labels(self) -> Tensor | None:
        targets = getattr(self._dataset, "targets", None)
        if targets is None:
            return None
        where = f"An entry of `targets` of `{type(self._dataset).__name__}`"
        listed = targets.tolist() if hasattr(targets, "tolist") else targets
        found = torch.tensor([whole_label(label, where) for label in listed], dtype=torch.int64)
        if len(found) != len(self):
            raise DataError(
                f"`{type(self._dataset).__name__}` has {len(self)} items, but its `targets` are "
                f"{len(found)}. Give each item its label."
            )
        return found


def whole_label(label: Any, where: str) -> int:
    """Return a label as an int.

    Raises:
        DataError: it is anything but a whole number; `where` is what the message calls its place.
    """
    try:
        number = int(label)
        if bool(number == label):
            return number
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise DataError(
        f"{where} has the label {label!r}, wanted a whole number: that of its class, from 0 on."
    )


def counted_classes(labels: Sequence[int], where: str) -> int:
    """Return the number of classes, if nobody says it: the largest label, and one for 0.

    Raises:
        DataError: there are fewer labels, so that they must be something else.
    """
    count = max(labels) + 1
    if count > len(labels):
        raise DataError(
            f"{where} has {len(labels)} labels, of which one is {max(labels)}: wanted the numbers "
            "of classes, from 0 on."
        )
    return count


def _checked_image(image: Any, where: str) -> Image | Tensor:
    """Return a PIL image, or a tensor in which every float is a finite float32."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, Tensor):
        raise DataError(
            f"{where} has a {type(image).__name__} for an image; wanted a PIL image, or a tensor "
            "[C, H, W] of uint8, or of float in the network's size."
        )
    if not image.is_floating_point():
        return image
    if not bool(torch.isfinite(image).all()):
        raise DataError(f"{where} has an image with NaN or infinite values. Correct the data set.")
    return image.to(torch.float32)


class Selection(Examples):
    """Some of the examples of another, in a given order."""

    def __init__(self, examples: Examples, indices: Sequence[int]) -> None:
        self._examples = examples
        self._indices = list(indices)
        self.is_foreign = examples.is_foreign

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> tuple[Image | Tensor, int]:
        return self._examples.read(self._indices[index])

    def labels(self) -> Tensor | None:
        labels = self._examples.labels()
        return None if labels is None else labels[self._indices]


def as_image(pixels: Tensor) -> Image:
    """Return a [C, H, W] uint8 tensor, grey or RGB, as a PIL image.

    Raises:
        DataError: it has another type or shape.
    """
    from PIL import Image

    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[0] not in (1, 3):
        raise DataError(
            f"An image is a tensor of {pixels.dtype} and shape {list(pixels.shape)}; wanted uint8 "
            "[C, H, W] with 1 or 3 channels, or float in the network's size, or a PIL image."
        )
    values = pixels.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(values[:, :, 0] if pixels.shape[0] == 1 else values)


def select(examples: Examples, indices: Sequence[int]) -> Examples:
    """Return the examples of these indices; those in memory stay there."""
    if isinstance(examples, MemoryExamples):
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return MemoryExamples(examples.pixels[chosen], examples.labels()[chosen])
    return Selection(examples, indices)


def in_memory(
    examples: Examples, metadata: Metadata, *, corrupt: str
) -> tuple[MemoryExamples, list[str]]:
    """Read every image and resize and crop it to `metadata.input_size`, as bytes.

    Args:
        examples: images of any size and kind but float tensors.
        metadata: as for `preprocessing.image_to_pixels`.
        corrupt: "skip" leaves out images that cannot be read; "error" raises.

    Returns:
        The examples, and a line for each image that was left out.

    Raises:
        DataError: an image cannot be read and `corrupt` is "error", or none can; or a label is no
            number.
    """

    def read(index: int) -> tuple[Tensor, int] | str:
        try:
            image, label = examples.read(index)
            whole = as_image(image) if isinstance(image, Tensor) else image
            return image_to_pixels(whole, metadata), label
        except DataError:
            raise
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:  # decoding releases Python's lock
        found = list(pool.map(read, range(len(examples))))
    unreadable = [one for one in found if isinstance(one, str)]
    readable = [one for one in found if not isinstance(one, str)]
    if unreadable and corrupt == "error":
        raise DataError(unreadable[0])
    if not readable:
        raise DataError(f"No image can be read. The first one: {unreadable[0]}")
    pixels = torch.stack([image for image, _ in readable])
    return MemoryExamples(pixels, torch.tensor([label for _, label in readable])), unreadable
