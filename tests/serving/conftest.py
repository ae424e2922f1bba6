"""A small classifier's file, and images of many kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from biper_engine.metadata import Metadata
from tests.networks_by_hand import classifier, two_inputs


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a classifier of 3x8x8 images in ten classes, `a` to `j`."""
    path = tmp_path_factory.mktemp("network") / "net.biper"
    classifier(metadata=preparation(0.5)).save(path)
    return path


def preparation(mean: float) -> Metadata:
    return Metadata(
        input_size=(3, 8, 8), mean=(mean,) * 3, std=(0.2,) * 3, class_names=tuple("abcdefghij")
    )


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a network of two inputs."""
    path = tmp_path_factory.mktemp("two") / "two.biper"
    two_inputs().save(path)
    return path


def noise_image(seed: int) -> Image.Image:
    draw = np.random.default_rng(seed)
    height, width = draw.integers(8, 20, 2)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 23 images, in folders and with odd names, one of them cut short."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "tief/ü ☃").mkdir(parents=True)
    for number in range(22):
        place = folder / ("tief/ü ☃" if number % 3 == 0 else ".")
        noise_image(number).save(place / f"bild {number}'\".{'png' if number % 2 else 'jpg'}")
    whole = (folder / "bild 1'\".png").read_bytes()
    (folder / "tief/broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    return folder
