"""Settings of a training run: plain, frozen values that are stored with every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["RunOptions", "StageConfig", "TrainingConfig"]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Optimisation of one stage.

    Attributes:
        epochs: passes over the training images.
        lr: peak learning rate, reached after the warm-up and then decayed to 0 by a cosine.
        weight_decay: L2 penalty on every parameter, as in the official code.
        tau: weight of the periodic regulariser (`nn.regularizer`).
    """

    epochs: int
    lr: float
    weight_decay: float
    tau: float

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"`epochs` (={self.epochs}) must be 1 or more.")
        if self.lr <= 0 or self.weight_decay < 0 or self.tau < 0:
            raise ValueError(
                f"`lr` (={self.lr}) must be above 0, `weight_decay` (={self.weight_decay}) and "
                f"`tau` (={self.tau}) at least 0."
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A whole run: data, network and both stages.

    Attributes:
        dataset: a name from `training.data.available()`.
        architecture: a name from `models.available()`.
        frequency: w0 of sin(w0*w); not used by networks that are not BiPer's.
        batch_size: images per step and device; an incomplete last batch is dropped.
        momentum: of SGD.
        warmup_epochs: epochs of linear warm-up at the start of each stage.
        max_shift_px: images are moved by up to this many pixels along each axis.
        max_rotation_deg: images are turned by up to this angle.
        max_zoom: images are scaled by a factor in [1 - max_zoom, 1 + max_zoom].
        seed: for initial weights, order and augmentation.
        hold_out: train without the validation part and measure on it, to choose settings;
            False trains on everything and measures on the test images.
        precision: Lightning's name, such as "32-true" or "bf16-mixed".
    """

    dataset: str = "digits"
    architecture: str = "cifar10/resnet20_1w1a"
    # The defaults are the best of about 20 settings by accuracy on the validation part (297 images,
    # standard error 0.9 points), trained on the first 1,000: 97.98 and 97.64 % with seeds 0 and 1.
    # They were compared by a plain loop of the same two stages, without Lightning, that kept the
    # last incomplete batch of an epoch. The test images were not used for the choice.
    frequency: float = 10.0
    stage1: StageConfig = field(
        default_factory=lambda: StageConfig(epochs=10, lr=0.1, weight_decay=1e-3, tau=0.02)
    )
    stage2: StageConfig = field(
        default_factory=lambda: StageConfig(epochs=10, lr=0.05, weight_decay=1e-4, tau=0.02)
    )
    batch_size: int = 48
    momentum: float = 0.9
    warmup_epochs: float = 1.0
    max_shift_px: float = 2.0
    max_rotation_deg: float = 12.0
    max_zoom: float = 0.1
    seed: int = 0
    hold_out: bool = False
    precision: str = "32-true"

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ValueError(f"`batch_size` (={self.batch_size}) must be 2 or more for BatchNorm.")
        if not 0 <= self.max_zoom < 1:
            raise ValueError(f"`max_zoom` (={self.max_zoom}) must be in [0, 1).")

    def stage(self, number: int) -> StageConfig:
        """Return the settings of stage 1 or 2."""
        return self.stage1 if number == 1 else self.stage2

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of JSON values; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """Build from `to_dict`; an unknown key is an error."""
        stages = {key: StageConfig(**values[key]) for key in ("stage1", "stage2") if key in values}
        return cls(**{**values, **stages})


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Devices and output of a run; they do not change what is trained, except for rounding.

    Attributes:
        accelerator, devices, num_nodes, strategy: as Lightning's Trainer.
        progress_bar: show a progress bar while training.
        tensorboard: write TensorBoard logs in addition to the CSV logs.
    """

    accelerator: str = "auto"
    devices: int | str | list[int] = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    progress_bar: bool = True
    tensorboard: bool = False
