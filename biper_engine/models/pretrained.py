"""The trained networks of this package as PyTorch modules, and images to try them on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from biper_engine.models.network import Network
from biper_engine.models.signs_file import read_signs
from biper_engine.shipped import card, shipped_file

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["pretrained", "samples"]


def pretrained(name: str) -> Network:
    """Return a trained network that comes with this package, as a PyTorch module in eval mode.

    `models.load` returns the engine made of it. The binary layers have the signs of the trained
    weights, all else is as trained, so that the logits are those of the trained network, bit for
    bit. The latent weights themselves are not in the package: training goes on from
    +-pi / (2 * frequency).

    Args:
        name: one of `shipped()`, such as "digits/resnet20_1w1a".

    Raises:
        ValueError: there is no such network; the message has the nearest name.
        FileFormatError: its weights are missing or damaged.
    """
    with shipped_file(name, ".safetensors") as path:
        return read_signs(path)


def samples(name: str) -> list[Image]:
    """Return images of a trained network's data set: the first test image of each class.

    Args:
        name: one of `shipped()`, such as "digits/resnet20_1w1a".

    Returns:
        One image for each class, in the order of `card(name).classes`;
        `preprocessing.image_to_tensor(image, network.metadata)` prepares it.

    Raises:
        ValueError: there is no such network; the message has the nearest name.
        FileFormatError: the images are missing or damaged.
    """
    from PIL import Image

    with shipped_file(name, ".png") as path, Image.open(path) as strip:
        width = strip.width // len(card(name).classes)
        return [
            strip.crop((left, 0, left + width, strip.height))
            for left in range(0, strip.width, width)
        ]
