"""What an engine knows about its inputs and its origin, besides the numbers.

`Metadata` uses the keys of timm's `pretrained_cfg`, so that people and other tools can read files.
`Provenance` says where the weights came from. Both are plain data that JSON can store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

__all__ = ["Metadata", "Provenance"]

Interpolation = Literal["nearest", "bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Preprocessing and labels of an image model, under timm's names.

    Attributes:
        input_size: (channels, height, width) of one image after preprocessing.
        interpolation: resampling filter of the resize, with Pillow's name.
        crop_pct: side of the centre crop over the side of the resized image, in (0, 1].
        mean: per-channel mean subtracted from pixels in [0, 1].
        std: per-channel standard deviation that pixels are divided by.
        class_names: label of each logit, or None if unknown.
    """

    input_size: tuple[int, int, int] | None = None
    interpolation: Interpolation = "bilinear"
    crop_pct: float = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("input_size", "mean", "std", "class_names"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise ValueError(
                f"`interpolation` (={self.interpolation!r}) must be 'nearest', 'bilinear' or "
                "'bicubic'."
            )
        if not 0.0 < self.crop_pct <= 1.0:
            raise ValueError(f"`crop_pct` (={self.crop_pct}) must be in (0, 1].")
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(
                f"`mean` (={self.mean}) and `std` (={self.std}) must have one entry per channel, "
                "every standard deviation above 0."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of JSON values; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Metadata:
        """Build from a dict, ignoring keys that this version does not know."""
        return cls(**_known(cls, values))


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a network's weights came from.

    Attributes:
        architecture: name for `biper_engine.models.build`, or None for a foreign network.
        frequency: w0 of sign(sin(w0*w)), or None if it does not apply.
        stage: BiPer training stage, 1 or 2, or None if it does not apply.
        licence: SPDX identifier of the weights, if known.
        weight_binarizer: what BiPer's sine was replaced with, or None if it was not.
    """

    architecture: str | None = None
    frequency: float | None = None
    stage: int | None = None
    licence: str | None = None
    weight_binarizer: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of JSON values; `from_dict` is the inverse."""
        values = asdict(self)
        if self.weight_binarizer is None:  # most files do without the key
            del values["weight_binarizer"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """Build from a dict, ignoring keys that this version does not know."""
        return cls(**_known(cls, values))


def _known(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    return {key: value for key, value in values.items() if key in names}
