"""Published formats of image data sets: IDX, and the binary version of CIFAR."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from biper_engine.errors import DataError
from biper_engine.training.examples import MemoryExamples

__all__ = ["read_cifar", "read_idx_pair"]

_Bytes = NDArray[np.uint8]
_CIFAR_IMAGE_BYTES = 3 * 32 * 32
_PIECE_BYTES = 2**24


def read_idx_pair(images: Path, labels: Path) -> MemoryExamples:
    """Read grey images and their labels, as MNIST's page describes; `.gz` files are unpacked.

    Raises:
        DataError: a file is not of its kind, truncated or too long, or the counts differ.
    """
    pixels, numbers = _read_idx(images, 3), _read_idx(labels, 1)
    if len(pixels) != len(numbers):
        raise DataError(
            f"'{images}' has {len(pixels):,} images, but '{labels}' has {len(numbers):,} labels. "
            "They must belong together: take both from the same data set."
        )
    if not len(numbers):
        raise DataError(f"'{images}' has no image. Download it again.")
    return MemoryExamples(_tensor(pixels)[:, None], _tensor(numbers).to(torch.int64))


def _read_idx(path: Path, dimensions: int) -> _Bytes:
    """Read a file of bytes: 0, 0, 8 for unsigned bytes, the dimensions, each size, the values."""
    head = 4 + 4 * dimensions
    with _open(path) as file:
        start = _take(file, head, path)
        if start[:4] != bytes((0, 0, 8, dimensions)):
            raise DataError(
                f"'{path}' is no IDX file of {dimensions} dimension{'s' * (dimensions > 1)}: it "
                f"starts with {start[:4].hex(' ')}, wanted 00 00 08 {dimensions:02x}."
            )
        shape = tuple(int(size) for size in np.frombuffer(start, ">u4", offset=4))
        wanted = int(np.prod(shape, dtype=object))
        values = _take(file, wanted, path)
        if file.read(1):
            raise DataError(
                f"'{path}' goes on after its {wanted:,} bytes of {list(shape)}. It was not written "
                "whole; download it again."
            )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _open(path: Path) -> BinaryIO:
    try:
        return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise DataError(f"Cannot read '{path}': {error.strerror}.") from error


def _take(file: BinaryIO, count: int, path: Path) -> bytes:
    found = bytearray()
    try:  # in pieces: a damaged header may ask for more than any memory
        while piece := file.read(min(count - len(found), _PIECE_BYTES)):
            found += piece
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"'{path}' is damaged: {error}. Download it again.") from error
    if len(found) < count:
        raise DataError(
            f"'{path}' ends too early: {count:,} more bytes were wanted and {len(found):,} came. "
            "Download it again."
        )
    return bytes(found)


def read_cifar(paths: list[Path], *, label_bytes: int) -> MemoryExamples:
    """Read batches of CIFAR's binary version: for each image its label, then 3 planes of 32x32.

    Args:
        paths: in the order of the images.
        label_bytes: 1 in CIFAR-10; 2 in CIFAR-100, of which the second, the fine one, is taken.

    Raises:
        DataError: a file is missing or not a whole number of images.
    """
    size = label_bytes + _CIFAR_IMAGE_BYTES
    rows = []
    for path in paths:
        try:
            values = np.frombuffer(path.read_bytes(), np.uint8)
        except OSError as error:
            raise DataError(f"Cannot read '{path}': {error.strerror}.") from error
        if len(values) == 0 or len(values) % size:
            raise DataError(
                f"'{path}' has {len(values):,} bytes, wanted a multiple of {size:,}: a label of "
                f"{label_bytes} and an image of 32x32. Download the binary version again."
            )
        rows.append(values.reshape(-1, size))
    every = np.concatenate(rows)
    pixels = _tensor(every[:, label_bytes:]).view(-1, 3, 32, 32)
    return MemoryExamples(pixels, _tensor(every[:, label_bytes - 1]).to(torch.int64))


def _tensor(values: _Bytes) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).copy())
