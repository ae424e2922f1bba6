"""One training stage as a Lightning module. Imports Lightning: import this inside functions."""

from __future__ import annotations

from math import cos, pi, radians
from time import perf_counter
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn import functional as F

from biper_engine.models import Network
from biper_engine.nn import regularizer, set_tau
from biper_engine.training.config import TrainingConfig
from biper_engine.training.data import Part

__all__ = ["StageModule", "augment", "learning_rate_factor", "stage_seed"]


class StageModule(lightning.LightningModule):
    """Cross entropy plus regulariser, SGD, cosine with warm-up, for one stage of one network.

    Every random number of epoch e comes from a seed made of (config.seed, stage, e, rank). A run
    that was interrupted and resumed therefore ends with the same weights as one that was not.
    """

    def __init__(self, network: Network, config: TrainingConfig, stage: int) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.stage_number = stage
        self.settings = config.stage(stage)
        self.seconds = 0.0
        self._started = 0.0
        self._generator = torch.Generator()
        set_tau(network, self.settings.tau)

    def training_step(self, batch: Part, batch_index: int) -> Tensor:
        """Return the loss of one batch."""
        images, labels = batch
        images = augment(images, self.config, self._generator)
        images = images.contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(self.network(images), labels) + regularizer(self.network)
        self.log("train_loss", loss, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Part, batch_index: int) -> None:
        """Log the accuracy on one batch."""
        images, labels = batch
        accuracy = (self.network(images).argmax(1) == labels).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return SGD and its schedule, stepped every batch."""
        optimizer = torch.optim.SGD(
            [parameter for parameter in self.network.parameters() if parameter.requires_grad],
            lr=self.settings.lr,
            momentum=self.config.momentum,
            weight_decay=self.settings.weight_decay,
        )
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(self.config.warmup_epochs * total / self.settings.epochs)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, warmup, total)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_epoch_start(self) -> None:
        """Seed the epoch's augmentation and start its clock."""
        self._started = perf_counter()
        seed = stage_seed(self.config.seed, self.stage_number) + self.current_epoch
        # A separate generator, because Lightning and DataLoader draw from the global one.
        self._generator = torch.Generator(self.device).manual_seed(seed + (self.global_rank << 40))

    def on_train_epoch_end(self) -> None:
        """Add the epoch to the training time."""
        self.seconds += perf_counter() - self._started

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the config beside Lightning's state."""
        checkpoint["biper_config"] = self.config.to_dict()
        checkpoint["biper_seconds"] = self.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the training time of the interrupted run."""
        self.seconds = checkpoint["biper_seconds"]


def stage_seed(seed: int, stage: int) -> int:
    """Return the base to which the epoch number is added; a stage has room for 2^16 epochs."""
    return (seed * 2 + stage) << 16


def learning_rate_factor(step: int, warmup: int, total: int) -> float:
    """Return the share of the peak rate at a step: linear to 1 in `warmup` steps, cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + cos(pi * (step - warmup) / max(1, total - warmup)))


def augment(images: Tensor, config: TrainingConfig, generator: torch.Generator) -> Tensor:
    """Move, turn and scale each image at random, bilinearly, with its border repeated outside.

    Args:
        images: [N, C, H, W] float.
        config: its `max_shift_px`, `max_rotation_deg` and `max_zoom`; all 0 returns `images`.
        generator: random numbers, on the device of `images`.
    """
    if not (config.max_shift_px or config.max_rotation_deg or config.max_zoom):
        return images
    count, _, height, width = images.shape
    draws = torch.empty(count, 4, device=images.device, dtype=images.dtype)
    draws.uniform_(-1, 1, generator=generator)
    angle = draws[:, 0] * radians(config.max_rotation_deg)
    zoom = 1 + draws[:, 1] * config.max_zoom
    # grid_sample's unit is half an image: a pixel is 2 / width.
    shift_x = draws[:, 2] * (2 * config.max_shift_px / width)
    shift_y = draws[:, 3] * (2 * config.max_shift_px / height)
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    rows = torch.stack([cosine, -sine, shift_x, sine, cosine, shift_y], dim=1)
    grid = F.affine_grid(rows.view(count, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
