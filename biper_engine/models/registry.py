"""The networks of this package by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch

from biper_engine.metadata import Metadata, Provenance
from biper_engine.models.network import Network
from biper_engine.models.resnet import ResNet18, ResNet20
from biper_engine.models.vgg import VGGSmall

__all__ = ["Architecture", "architecture", "available", "build", "state_dict_shapes"]

_CIFAR10 = Metadata(
    input_size=(3, 32, 32),
    # The official CIFAR code normalises with ImageNet's statistics.
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    class_names=(
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One network of the registry.

    Attributes:
        name: `dataset/network`; the network part is the official code's function name.
        constructor: called as `constructor(num_classes, frequency=..., stage=...)`.
        metadata: preprocessing and classes of the task that the name stands for.
        num_classes: classes of that task.
        classifier: name of the last layer, whose weight has one row per class.
    """

    name: str
    constructor: Callable[..., Network]
    metadata: Metadata
    num_classes: int
    classifier: str


def _cifar10(network: str, constructor: Callable[..., Network], classifier: str) -> Architecture:
    return Architecture(
        name=f"cifar10/{network}",
        constructor=constructor,
        metadata=_CIFAR10,
        num_classes=10,
        classifier=classifier,
    )


_ARCHITECTURES = {
    entry.name: entry
    for entry in (
        _cifar10("resnet20_1w1a", ResNet20, "linear"),
        _cifar10("resnet18_1w1a", ResNet18, "linear"),
        _cifar10("vgg_small_1w1a", VGGSmall, "fc"),
    )
}


def available() -> tuple[str, ...]:
    """Return the names that `build` accepts."""
    return tuple(_ARCHITECTURES)


def architecture(name: str) -> Architecture:
    """Return the registry entry of `name`.

    Raises:
        ValueError: unknown name; the message has the closest match and every known name.
    """
    if name in _ARCHITECTURES:
        return _ARCHITECTURES[name]
    close = get_close_matches(name, _ARCHITECTURES, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"Unknown network {name!r}.{hint} Known: {', '.join(_ARCHITECTURES)}.")


def build(
    name: str, *, num_classes: int | None = None, frequency: float = 20.0, stage: int = 2
) -> Network:
    """Build a network with fresh weights, drawn from PyTorch's global generator.

    Args:
        name: one of `available()`, such as "cifar10/resnet20_1w1a".
        num_classes: None means the classes of the task in the name, and then `metadata` has that
            task's preprocessing and class names. With a number, the task is yours and `metadata`
            is None until you set it.
        frequency: w0 of sin(w0*w).
        stage: 1 for weights sin(w0*w), 2 for sign(sin(w0*w)).

    Returns:
        A module in training mode with `input_shape`, `provenance` and `metadata`. Its state dict
        has the names and shapes of the official code's.

    Raises:
        ValueError: unknown name, or a number out of range.
    """
    entry = architecture(name)
    classes = entry.num_classes if num_classes is None else num_classes
    if classes < 1:
        raise ValueError(f"`num_classes` (={num_classes}) must be 1 or more.")
    network = entry.constructor(classes, frequency=frequency, stage=stage)
    network.provenance = Provenance(architecture=name, frequency=float(frequency), stage=stage)
    network.metadata = entry.metadata if num_classes is None else None
    return network


def state_dict_shapes(name: str, num_classes: int) -> dict[str, torch.Size]:
    """Return name and shape of every state-dict entry, without allocating the weights."""
    with torch.device("meta"):
        network = build(name, num_classes=num_classes)
    return {key: value.shape for key, value in network.state_dict().items()}
