"""Sizes of the values in a network: integers, and sizes that grow with the batch.

A network takes any number N of images, of at least one. A size is either an integer or an
`ImagesSize`, which stands for `images * N + more`. A question that has different answers for
different N raises `MisfitError`, so that what a rule accepts holds for every batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "BATCH",
    "ImagesSize",
    "MisfitError",
    "Size",
    "divided",
    "floored",
    "product",
    "remainder",
    "require_small",
]

MAX_VALUES = 1 << 31
"""Most elements of one image of a value; also the first size that is too large."""


class MisfitError(ValueError):
    """The arguments of an operator do not fit it, or are not known to fit."""


@dataclass(frozen=True)
class ImagesSize:
    """The size `images * N + more` for N images, positive for every N of at least 1."""

    images: int
    more: int = 0

    def __add__(self, other: Size) -> Size:
        if isinstance(other, ImagesSize):
            return _size(self.images + other.images, self.more + other.more)
        return _size(self.images, self.more + other)

    __radd__ = __add__

    def __sub__(self, other: Size) -> Size:
        if isinstance(other, ImagesSize):
            return _size(self.images - other.images, self.more - other.more)
        return _size(self.images, self.more - other)

    def __rsub__(self, other: int) -> Size:
        return _size(-self.images, other - self.more)

    def __mul__(self, other: Size) -> Size:
        if isinstance(other, ImagesSize):
            raise MisfitError(f"{self} * {other} is not a multiple of the batch")
        return _size(self.images * other, self.more * other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Size) -> Size:
        return divided(self, other)

    def __lt__(self, other: Size) -> bool:
        return not self >= other

    def __ge__(self, other: Size) -> bool:
        images, more = self.images, self.more
        if isinstance(other, ImagesSize):
            images, more = images - other.images, more - other.more
        else:
            more = more - other
        if images >= 0 and images + more >= 0:  # for the smallest batch, hence for every batch
            return True
        if images <= 0 and images + more < 0:
            return False
        raise MisfitError(f"whether {self} is at least {other} depends on the batch")

    def __gt__(self, other: Size) -> bool:
        return self >= other + 1

    def __le__(self, other: Size) -> bool:
        return not self > other

    def __str__(self) -> str:
        text = "N" if self.images == 1 else f"{self.images} * N"
        return f"{text} + {self.more}" if self.more else text


Size = int | ImagesSize


BATCH = ImagesSize(1)
"""The number of images, N."""


def _size(images: int, more: int) -> Size:
    if images == 0:
        return more
    if images < 0 or images + more < 1:
        raise MisfitError(f"{images} * N + {more} is not a size for every batch")
    if images >= MAX_VALUES or abs(more) >= MAX_VALUES:
        raise MisfitError(f"{images} * N + {more} is too large for a size")
    return ImagesSize(images, more)


def divided(size: Size, divisor: Size) -> Size:
    """Return `size / divisor`, which must be exact for every batch."""
    if isinstance(divisor, ImagesSize):
        if not isinstance(size, ImagesSize) or size.images * divisor.more != (
            size.more * divisor.images
        ):
            raise MisfitError(f"{size} cannot be divided by {divisor} for every batch")
        return divided(size.images, divisor.images)
    if divisor < 1:
        raise MisfitError(f"{size} cannot be divided by {divisor}")
    if isinstance(size, int):
        if size % divisor:
            raise MisfitError(f"{size} cannot be divided by {divisor}")
        return size // divisor
    if size.images % divisor or size.more % divisor:
        raise MisfitError(f"{size} cannot be divided by {divisor} for every batch")
    return _size(size.images // divisor, size.more // divisor)


def floored(size: Size, divisor: Size) -> Size:
    """Return `size // divisor`, which must be a size of the same form for every batch."""
    if isinstance(divisor, ImagesSize) or divisor < 1:
        return divided(size, divisor)
    if isinstance(size, int):
        return size // divisor
    if size.images % divisor:
        raise MisfitError(f"{size} // {divisor} has no such form for every batch")
    return _size(size.images // divisor, size.more // divisor)


def remainder(size: Size, divisor: Size) -> Size:
    """Return `size % divisor`, which must be the same for every batch."""
    if (
        isinstance(divisor, ImagesSize)
        or divisor < 1
        or (isinstance(size, ImagesSize) and size.images % divisor)
    ):
        raise MisfitError(f"{size} % {divisor} is not the same for every batch")
    return (size.more if isinstance(size, ImagesSize) else size) % divisor


def product(sizes: Iterable[Size]) -> Size:
    """Return the product of sizes; at most one of them may grow with the batch."""
    total: Size = 1
    for size in sorted(sizes, key=lambda size: isinstance(size, ImagesSize)):
        total = size * total
    return total


def require_small(shape: Iterable[Size]) -> None:
    """Require at most MAX_VALUES elements for one image."""
    sizes = [size.images + size.more if isinstance(size, ImagesSize) else size for size in shape]
    if math.prod(max(size, 1) for size in sizes) > MAX_VALUES:
        raise MisfitError(f"a value of {sizes} has more than {MAX_VALUES:,} elements per image")
