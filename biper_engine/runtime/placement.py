"""Where the numbers of a value lie: a block of memory for each image, and sizes and strides in it.

The value of a node is a tensor for N images. One of its dimensions grows with N: it has N times as
many places as for one image, those of an image side by side. So all that happens to the values
within an image is found from the tensor for one image, which needs no data: its strides say which
numbers of a map it has, and PyTorch's own views tell where their results lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from biper_engine.bits import words
from biper_engine.ops.cpu_program import Map

__all__ = [
    "CHANNELS_LAST",
    "INTEGERS",
    "Placed",
    "constant_of",
    "dense_image",
    "is_dense",
    "memory_order",
    "place_map",
    "place_packed",
    "reshaped",
    "without_gaps",
]

INTEGERS = (torch.int32, torch.int64)
"""The dtypes of integers that flow."""

CHANNELS_LAST = (0, 2, 3, 1)
"""The dimensions of a map [N, C, H, W] from the outermost to the innermost in memory."""


@dataclass(frozen=True)
class Placed:
    """The value of a node in a program.

    Attributes:
        source: the map that has its numbers, or a constant's float32 numbers.
        image: the tensor for one image, without data; its strides and offset count in the map.
        batch: the dimension that grows with the batch; None if the value is a constant.
        shape: sizes for one image, where the value is a reshape of `image` that is not copied yet.
        truth: whether the numbers, 1 and 0, stand for true and false.
        integers: the dtype of integers, int32 or int64; a packed map has those of an input, which
            `image` counts, other maps have them as floats.
    """

    source: Map | Tensor
    image: Tensor
    batch: int | None = 0
    shape: tuple[int, ...] | None = None
    truth: bool = False
    integers: torch.dtype | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes for one image."""
        return tuple(self.image.shape) if self.shape is None else self.shape

    @property
    def packed(self) -> bool:
        """Whether it is a packed map, or integers of an input."""
        return isinstance(self.source, Map) and self.source.packed

    @property
    def values(self) -> int:
        """Numbers in the memory of one image."""
        return self.source.values if isinstance(self.source, Map) else self.source.numel()

    def sizes_for(self, batch: int) -> tuple[int, ...]:
        """Return the sizes for so many images."""
        sizes = list(self.sizes)
        if self.batch is not None:
            sizes[self.batch] *= batch
        return tuple(sizes)

    def viewed(self, image: Tensor, batch: int | None) -> Placed:
        """Return a view of the same memory."""
        return replace(self, image=image, batch=batch, shape=None)


def dense_image(sizes: Sequence[int], order: Sequence[int] | None = None) -> Tensor:
    """Return a tensor without data or gaps, its dimensions in `order` from the outermost one."""
    strides, stride = [0] * len(sizes), 1
    for dim in reversed(order if order is not None else range(len(sizes))):
        strides[dim] = stride
        stride *= sizes[dim]
    return torch.empty_strided(tuple(sizes), strides, device="meta")


def memory_order(image: Tensor) -> tuple[int, ...]:
    """Return the dimensions from the outermost to the innermost in memory.

    Those of size 1 come first; repeated ones, whose stride is 0, come next.
    """

    def key(dim: int) -> tuple[int, int, int]:
        stride = image.stride(dim)
        if image.shape[dim] == 1:
            return 0, 0, dim
        return (1, 0, dim) if stride == 0 else (2, -stride, dim)

    return tuple(sorted(range(image.dim()), key=key))


def without_gaps(image: Tensor) -> bool:
    """Whether every number from the first to the last belongs to one place."""
    return is_dense(image, memory_order(image))


def is_dense(image: Tensor, order: Sequence[int]) -> bool:
    """Whether the dimensions lie in `order` from the outermost one, without gaps."""
    stride = 1
    for dim in reversed(order):
        if image.shape[dim] != 1 and image.stride(dim) != stride:
            return False
        stride *= image.shape[dim]
    return True


def fills(placed: Placed) -> bool:
    """Whether a value begins where its memory does, and has as many numbers."""
    return placed.image.storage_offset() == 0 and placed.image.numel() == placed.values


def constant_of(tensor: Tensor) -> Placed:
    """Return the value of a constant."""
    # In memory of its own, where strides count from the first number.
    numbers = tensor.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
    image = dense_image(tuple(tensor.shape))
    integers = tensor.dtype if tensor.dtype in INTEGERS else None
    return Placed(
        numbers.flatten(), image, None, truth=tensor.dtype == torch.bool, integers=integers
    )


def place_map(x: Map, images: int = 1) -> Placed:
    """Return a float map [images, C, H / images, W] of which an image's pixels lie in rows."""
    sizes = (images, x.channels, x.height // images, x.width)
    return Placed(x, dense_image(sizes, CHANNELS_LAST))


def place_packed(x: Map, images: int = 1) -> Placed:
    """Return a packed map."""
    return Placed(x, dense_image((images, x.height // images, x.width, words(x.channels))))


def reshaped(placed: Placed, shape: tuple[int, ...], batch: int | None) -> Placed:
    """Return a value in another shape: a view where strides allow, else one to be copied."""
    try:
        return replace(placed, image=placed.image.view(shape), batch=batch, shape=None)
    except RuntimeError:  # numbers that are neighbours in the shape don't lie evenly in memory
        return replace(placed, batch=batch, shape=shape)


def batch_after_reshape(
    sizes: Sequence[int], batch: int, target: Sequence[int], batches: int
) -> int | None:
    """Return the dimension of a reshaped value that grows with the batch.

    Args:
        sizes: sizes of the value for one image.
        batch: its dimension that grows.
        target: sizes of the result for `batches` images.
        batches: a number of images that divides no other size.

    Returns:
        None where the numbers of an image would not stay together.
    """
    before = math.prod(sizes[:batch])
    for dim, size in enumerate(target):
        if math.prod(target[:dim]) == before and size % batches == 0:
            return dim
    return None
