"""What a network predicts on the images that are measured: for the accuracy and the report."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from biper_engine.metadata import Metadata

__all__ = ["Predictions", "WrongImage"]

_WRONG_IMAGES = 24
_PICTURE_PX = 64


@dataclass(frozen=True, kw_only=True)
class WrongImage:
    """An image that the network takes for something else.

    Attributes:
        index: number of the image among those that are measured.
        label, predicted: numbers of its class, and of that with the largest logit.
        probability: softmax of that logit.
        picture: a small PNG or JPEG file, in base64.
        media_type: "image/png" or "image/jpeg".
    """

    index: int
    label: int
    predicted: int
    probability: float
    picture: str
    media_type: str


@dataclass(kw_only=True)
class Predictions:
    """Counts of (class, predicted class), and the wrong images of which the network is surest.

    Attributes:
        confusion: number of images by (label, predicted).
        wrong: as many as a page can show, surest first.
    """

    confusion: Counter[tuple[int, int]] = field(default_factory=Counter)
    wrong: list[WrongImage] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Number of images."""
        return self.confusion.total()

    @property
    def accuracy(self) -> float:
        """Share of images whose class has the largest logit."""
        right = sum(count for (label, found), count in self.confusion.items() if label == found)
        return right / self.images

    def add(self, images: Tensor, labels: Tensor, logits: Tensor, metadata: Metadata) -> None:
        """Count a batch [N, C, H, W] of images as the network takes them, all on the CPU."""
        probabilities, predicted = logits.float().softmax(1).max(1)
        first = self.images
        self.confusion.update(zip(labels.tolist(), predicted.tolist(), strict=True))
        for row in (predicted != labels).nonzero().flatten().tolist():
            probability = float(probabilities[row])
            if len(self.wrong) == _WRONG_IMAGES and probability <= self.wrong[-1].probability:
                continue
            picture, media_type = _picture(images[row], metadata)
            one = WrongImage(
                index=first + row,
                label=int(labels[row]),
                predicted=int(predicted[row]),
                probability=probability,
                picture=picture,
                media_type=media_type,
            )
            self.wrong = sorted([*self.wrong, one], key=lambda one: -one.probability)
            del self.wrong[_WRONG_IMAGES:]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `from_dict` is the inverse."""
        counts = [[label, found, count] for (label, found), count in sorted(self.confusion.items())]
        return {"confusion": counts, "wrong": [asdict(one) for one in self.wrong]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Predictions:
        """Build from `to_dict`."""
        counts = {(label, found): count for label, found, count in values["confusion"]}
        wrong = [WrongImage(**one) for one in values["wrong"]]
        return cls(confusion=Counter(counts), wrong=wrong)


def _picture(image: Tensor, metadata: Metadata) -> tuple[str, str]:
    """Return an image [C, H, W] as a small file in base64, and its media type."""
    from PIL import Image

    mean, std = (torch.tensor(values)[:, None, None] for values in (metadata.mean, metadata.std))
    pixels = ((image.float() * std + mean).nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    if len(pixels) not in (1, 3):
        pixels = pixels[:1]
    if len(pixels) == 3 and torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2]):
        pixels = pixels[:1]
    array = pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy()
    picture = Image.fromarray(array)
    is_small = max(picture.size) <= _PICTURE_PX
    picture.thumbnail((_PICTURE_PX * 2, _PICTURE_PX * 2))
    data = io.BytesIO()
    if is_small:
        picture.save(data, "PNG", optimize=True)
    else:
        picture.save(data, "JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode(), "image/png" if is_small else "image/jpeg"
