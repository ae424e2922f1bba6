"""A folder of images with a folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from biper_engine.errors import DataError
from biper_engine.training.examples import FileExamples

__all__ = ["class_folders", "find_parts", "read_tree"]

SUFFIXES = (*(".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),)
_TRAIN, _TEST = ("train", "training"), ("val", "valid", "validation", "test")


def find_parts(folder: Path) -> tuple[Path, Path | None]:
    """Return the folders of the training and the test images.

    They are `train` and the first of `val`, `valid`, `validation` and `test` that is there, or
    `folder` itself and None. A `train` without folders beside other names is a class: trains.
    """
    train = _child(folder, _TRAIN)
    if train is None:
        return folder, None
    others = {path.name for path in class_folders(folder)}.difference(_TRAIN, _TEST)
    if others and not class_folders(train):
        return folder, None
    return train, _child(folder, _TEST)


def _child(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def class_folders(folder: Path) -> list[Path]:
    """Return the folders in `folder` by name; hidden ones are left out."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"Cannot read the folder '{folder}': {error.strerror}.") from error
    return [path for path in found if path.is_dir() and not path.name.startswith(".")]


def read_tree(folder: Path, classes: Sequence[str] | None = None) -> tuple[FileExamples, list[str]]:
    """Find the images of each class; they are not opened.

    Args:
        folder: with a folder for each class, in which images may lie at any depth.
        classes: names that it must have, in this order; None takes its folders, by name.

    Returns:
        The examples, and the names of the classes; a label is an index into these.

    Raises:
        DataError: there is no class or one only, a class has no image, or other classes are wanted.
    """
    found = class_folders(folder)
    names = [path.name for path in found]
    if len(names) < 2:
        said = f"only the folder '{names[0]}'" if names else "no folder"
        raise DataError(
            f"'{folder}' has {said} in it; wanted a folder for each class, two or more, with the "
            "images of that class."
        )
    if classes is not None and names != list(classes):
        missing = ", ".join(sorted(set(classes) - set(names))) or "none"
        other = ", ".join(sorted(set(names) - set(classes))) or "none"
        raise DataError(
            f"'{folder}' has other classes than the training images: missing {missing}; unknown "
            f"{other}. Both need the same folders."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, path in enumerate(found):
        images = _images(path)
        if not images:
            raise DataError(
                f"The class '{path.name}' is empty: '{path}' has no image "
                f"({', '.join(SUFFIXES)}). Add some, or remove the folder."
            )
        paths += images
        labels += [label] * len(images)
    return FileExamples(paths, labels), names


def _images(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
