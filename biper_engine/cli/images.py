"""Load image files into batches, with the preprocessing of a `.biper` file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from biper_engine.cli.console import progress

if TYPE_CHECKING:
    from torch import Tensor

    from biper_engine import Engine, Metadata

__all__ = ["find_images", "image_batches", "preprocessing_of"]

_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the files among `paths`, and every image below each directory, in order.

    Raises:
        ValueError: a path does not exist, or a directory has no image.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"There is no image or directory '{path}'.")
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file()
        )
        if not inside:
            raise ValueError(
                f"No image file in '{path}' or below. "
                f"Wanted one of: {', '.join(sorted(_SUFFIXES))}."
            )
        found += inside
    return found


def preprocessing_of(engine: Engine, file: Path) -> Metadata:
    """Return the metadata of a file, which says how to prepare images.

    Raises:
        ValueError: the file does not say how its images are prepared.
    """
    metadata = engine.metadata
    if metadata is None or metadata.input_size is None:
        raise ValueError(
            f"'{file}' does not say how its images are prepared (size, mean, std). Set "
            "`model.metadata = biper_engine.Metadata(input_size=..., mean=..., std=...)` before "
            "converting, and convert again."
        )
    return metadata


def image_batches(
    paths: Sequence[Path], metadata: Metadata, batch_size: int
) -> Iterator[tuple[list[Path], Tensor]]:
    """Yield the paths and the tensor [N, C, H, W] of each batch."""
    import torch

    from biper_engine.preprocessing import image_to_tensor

    starts = range(0, len(paths), batch_size)
    for start in progress(starts, "Images"):
        chunk = list(paths[start : start + batch_size])
        yield chunk, torch.stack([image_to_tensor(path, metadata) for path in chunk])
