"""Load image files into batches, with the preprocessing of a `.biper` file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import floor, isfinite, nextafter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biper_engine.cli.console import progress

if TYPE_CHECKING:
    from torch import Tensor

    from biper_engine import Engine, Metadata

__all__ = ["Labels", "Mean", "Preparation", "Size", "Std", "image_batches", "preprocessing_of"]

Mean = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B", help="Mean of pixels in [0, 1], if the file lacks it.", show_default=False
    ),
]
Std = Annotated[
    str | None,
    typer.Option(metavar="R,G,B", help="Their standard deviation.", show_default=False),
]
Size = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Resize the shorter side to this, and cut out the middle.",
        show_default=False,
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Class names, one a line.", show_default=False),
]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What a user says about the images, instead of the file.

    Attributes:
        mean, std: a number for each channel, or one for all, with commas; of pixels in [0, 1].
        size: length to which the shorter side is resized; the middle is then cut out.
        labels: a file with the name of a class in each line.
    """

    mean: str | None = None
    std: str | None = None
    size: int | None = None
    labels: Path | None = None

    @property
    def is_given(self) -> bool:
        """Whether there is anything about pixels."""
        return any(value is not None for value in (self.mean, self.std, self.size))

    def applied(self, metadata: Metadata) -> Metadata:
        """Return metadata with what the user said; its `input_size` must be known."""
        assert metadata.input_size is not None
        channels, height, width = metadata.input_size
        changes: dict[str, Any] = {}
        for name in ("mean", "std"):
            text = getattr(self, name)
            if text is not None:
                changes[name] = _numbers(f"--{name}", text, channels)
        if self.size is not None:
            changes["crop_pct"] = _share(min(height, width), self.size)
        if self.labels is not None:
            changes["class_names"] = _lines(self.labels)
        return replace(metadata, **changes)


def _numbers(option: str, text: str, channels: int) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, channels) or not all(map(isfinite, values)):
        raise ValueError(
            f"{option} (={text}) must be {channels} numbers with commas between them, one for "
            "each channel, or one number."
        )
    if option == "--std" and not all(value > 0 for value in values):
        raise ValueError(f"{option} (={text}) must be above 0: pixels are divided by it.")
    return values * (channels // len(values))


def _share(cut: int, resized: int) -> float:
    """Return the `crop_pct` that resizes to `resized` and cuts out `cut`."""
    if resized < cut:
        raise ValueError(
            f"--size (={resized}) is less than the {cut} pixels that the network takes."
        )
    share = cut / resized
    while floor(cut / share) != resized:
        share = nextafter(share, 0.0)
    return share


def _lines(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"Cannot read --labels '{path}': {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--labels '{path}' is not text in UTF-8: {error}.") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def preprocessing_of(
    engine: Engine, file: Path, preparation: Preparation | None = None
) -> Metadata:
    """Return how to prepare images: as the file says, or a user.

    Raises:
        ValueError: neither says it, or what the user says does not fit.
    """
    from biper_engine import Metadata

    metadata, said = engine.metadata, preparation or Preparation()
    if metadata is None or metadata.input_size is None:
        if not said.is_given:
            raise ValueError(
                f"'{file}' does not say how its images are prepared: pass --mean and --std to "
                "biper run, predict or serve, or set `model.metadata = biper_engine.Metadata("
                "input_size=..., mean=..., std=...)` before converting, and convert again."
            )
        shape = engine.input_shape
        if len(shape) != 3:
            raise ValueError(f"'{file}' takes {engine.signature}, which is no image.")
        one = (0.0,) * shape[0]
        metadata = replace(
            metadata or Metadata(), input_size=shape, mean=one, std=(1.0,) * shape[0]
        )
    return said.applied(metadata)


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
