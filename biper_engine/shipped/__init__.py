"""Trained networks that come with the package: an engine's file and a card for each.

Each name has four files in this folder, which `benchmarks/ship.py` writes from a training run:

    NAME.biper         the engine
    NAME.json          the fields of `ModelCard`
    NAME.safetensors   the weights of the PyTorch network, for `models.pretrained`
    NAME.png           the first test image of each class, side by side, for `models.samples`
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch

from biper_engine.engine import Engine, load
from biper_engine.errors import FileFormatError
from biper_engine.files import sha256_of

__all__ = ["ModelCard", "card", "load_shipped", "shipped", "shipped_file"]

# The field of a card that has the SHA-256 of a file, by the file's end.
_SUMS = {".biper": "sha256", ".safetensors": "weights_sha256", ".png": "samples_sha256"}
_AGAIN = "Install biper-engine again."


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The time of a call.

    Attributes:
        median_ms, quartile_1_ms, quartile_3_ms: of many calls.
        batch: images of a call.
        threads: of the engine.
        processor: on which it was measured.
    """

    median_ms: float
    quartile_1_ms: float
    quartile_3_ms: float
    batch: int
    threads: int
    processor: str

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return (
            f"{self.median_ms:.2f} ms, quartiles {self.quartile_1_ms:.2f} to "
            f"{self.quartile_3_ms:.2f} ms (batch {self.batch}, {threads}, {self.processor})"
        )


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is known about a trained network.

    Attributes:
        name: for `models.load`.
        architecture: for `models.build`.
        data: what it was trained and measured on.
        data_licence: of the images.
        intended_use: what it is for, and what not.
        accuracy: share of the test images that the engine classifies correctly.
        test_images: their number.
        classes: names, in the order of the outputs.
        bytes: size of the engine's file.
        float_bytes: size of the float network's parameters and buffers.
        sha256: of the engine's file.
        weights_sha256: of the file that `models.pretrained` reads.
        samples_sha256: of the file that `models.samples` reads.
        packed: layers that run on bits.
        layers: all layers.
        verified: what the comparison with the trained network found.
        latency: time of a call.
        recipe: settings of its training, as YAML for `biper train`.
        versions: of the libraries that trained it.
        seconds: training time.
    """

    name: str
    architecture: str
    data: str
    data_licence: str
    intended_use: str
    accuracy: float
    test_images: int
    classes: tuple[str, ...]
    bytes: int
    float_bytes: int
    sha256: str
    weights_sha256: str
    samples_sha256: str
    packed: int
    layers: int
    verified: str
    latency: Latency
    recipe: str
    versions: dict[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `from_dict` is the inverse."""
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelCard:
        """Build from `to_dict`."""
        others = {"classes": tuple(values["classes"]), "latency": Latency(**values["latency"])}
        return cls(**{**values, **others})

    def __str__(self) -> str:
        smaller = self.float_bytes / self.bytes
        rows = {
            "network": f"{self.architecture}, {self.packed} of {self.layers} layers on bits",
            "data": f"{self.data} Licence: {self.data_licence}.",
            "use": self.intended_use,
            "accuracy": f"{self.accuracy:.2%} of {self.test_images:,} test images",
            "classes": ", ".join(self.classes),
            "file": f"{self.bytes:,} bytes, {smaller:.1f} times smaller than in float",
            "latency": str(self.latency),
            "verified": self.verified,
            "training": f"{self.seconds:,.0f} s; the recipe is in `recipe`",
        }
        return "\n".join([self.name, *(f"  {name:9} {text}" for name, text in rows.items())])


def shipped() -> tuple[str, ...]:
    """Return the names of the trained networks in this package."""
    return tuple(
        f"{group.name}/{file.name.removesuffix('.biper')}"
        for group in sorted(_folder().iterdir(), key=lambda one: one.name)
        if group.is_dir()
        for file in sorted(group.iterdir(), key=lambda one: one.name)
        if file.name.endswith(".biper")
    )


def card(name: str) -> ModelCard:
    """Return what is known about a trained network: print it, or read its fields.

    Raises:
        ValueError: there is no such network; the message has the nearest name.
        FileFormatError: the card is missing or damaged.
    """
    file = _file(_known(name), ".json")
    try:
        return ModelCard.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileFormatError(f"'{file}' is missing or damaged. {_AGAIN}") from error


def load_shipped(name: str, *, device: str | torch.device = "cpu") -> Engine:
    """Load a trained network that comes with this package.

    `engine.metadata` says how images are prepared, and has the names of the classes.

    Args:
        name: one of `shipped()`, such as "digits/resnet20_1w1a".
        device: device of the engine.

    Raises:
        ValueError: there is no such network; the message has the nearest name.
        FileFormatError: the file is missing or damaged.
    """
    with shipped_file(name) as path:
        return load(path, device=device)


@contextmanager
def shipped_file(name: str, suffix: str = ".biper") -> Iterator[Path]:
    """Give the path of a trained network's file, by its end, after a comparison with the card.

    Raises:
        ValueError: there is no such network; the message has the nearest name.
        FileFormatError: the file, or the card, is missing or damaged.
    """
    wanted = getattr(card(name), _SUMS[suffix])
    with as_file(_file(name, suffix)) as path:
        try:
            found = sha256_of(path)
        except OSError as error:
            raise FileFormatError(f"Cannot read '{path}'. {_AGAIN}") from error
        if found != wanted:
            raise FileFormatError(
                f"'{path}' is damaged, or of another version of biper_engine: its SHA-256 is not "
                f"that of its card. {_AGAIN}"
            )
        yield path


def _folder() -> Traversable:
    return files(__name__)


def _file(name: str, suffix: str) -> Traversable:
    group, _, network = name.partition("/")
    return _folder() / group / f"{network}{suffix}"


def _known(name: str) -> str:
    names = shipped()
    if name in names:
        return name
    ends = [one for one in names if one.partition("/")[2] == str(name).rpartition("/")[2]]
    close = [*get_close_matches(str(name), names, n=3, cutoff=0.5), *ends]
    nearest = " or ".join(repr(one) for one in dict.fromkeys(close))
    hint = f" Did you mean {nearest}?" if nearest else ""
    raise ValueError(
        f"There is no trained network {name!r} in this package.{hint} There are: "
        f"{', '.join(names) or 'none'}. models.build makes any network, untrained."
    )
