"""One training stage as a Lightning module. Imports Lightning: import this inside functions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from math import cos, pi
from time import perf_counter
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.models import Network
from biper_engine.nn import regularizer, set_tau
from biper_engine.training.config import TrainingConfig
from biper_engine.training.distillation import distilled
from biper_engine.training.draws import stage_seed
from biper_engine.training.feed import Feed
from biper_engine.training.finite import not_finite
from biper_engine.training.loader import Batch

__all__ = ["LatestState", "StageModule", "learning_rate_factor"]

# Steps between looks at the loss on devices where a look waits for all that was begun.
_LOOK_EVERY = 50


class StageModule(lightning.LightningModule):
    """Cross entropy plus regulariser, one optimizer with warm-up, for one stage of one network.

    The order of images and their augmentation depend on (config.seed, stage, epoch) alone, other
    random numbers on the step and process. A run that was interrupted and resumed therefore ends
    with the same weights as one that was not.
    """

    def __init__(
        self,
        network: Network,
        config: TrainingConfig,
        stage: int,
        feed: Feed,
        *,
        compiled: bool,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        # In a tuple, the teacher's weights are not among those that are trained and saved.
        self._teacher = () if teacher is None else (teacher,)
        self.network = network
        self.config = config
        self.stage_number = stage
        self.settings = config.stage(stage)
        self.feed = feed
        self.seconds = 0.0
        self.skipped: dict[str, None] = dict.fromkeys(feed.skipped)
        # Epoch and number of the next batch.
        self.position = (0, 0)
        self._loss_sum = torch.zeros((), dtype=torch.float64)
        # Of the images of the epoch so far: those classified correctly, and all.
        self._right = torch.zeros((), dtype=torch.int64)
        self._images = 0
        self._rate: Callable[[int], float] = lambda step: 1.0
        self._started = 0.0
        self._forward: Callable[[Tensor], Tensor] = torch.compile(network) if compiled else network
        set_tau(network, self.settings.tau)

    def train_dataloader(self) -> Any:
        """Return this process's batches, from the one on at which the run stopped."""
        epoch, start = self.position
        return self.feed.training(
            self.stage_number,
            rank=self.global_rank,
            world=self.trainer.world_size,
            epoch=epoch,
            start=start,
            pin_memory=self.device.type == "cuda",
        )

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of one batch."""
        images, labels, skipped = batch
        self._report(skipped)
        step = (self.current_epoch << 32) + batch_index * self.trainer.world_size + self.global_rank
        torch.manual_seed(stage_seed(self.config.seed, self.stage_number) ^ step)  # for dropout
        logits = self._forward(images)
        loss = self._loss(logits, images, labels) + regularizer(self.network)
        self.position = (self.current_epoch, batch_index + 1)
        self._right = self._right.to(loss.device) + (logits.detach().argmax(1) == labels).sum()
        self._images += len(labels)
        self._loss_sum = self._loss_sum.to(loss.device) + loss.detach()
        look = 1 if loss.device.type == "cpu" else _LOOK_EVERY
        if batch_index % look == 0 and not torch.isfinite(self._loss_sum):
            raise not_finite(self.network, images, loss, self.stage_number, self.position)
        return loss

    def _loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        for teacher in self._teacher:
            with torch.no_grad():
                wanted = teacher(images)
            return distilled(logits, labels, wanted, self.config.distillation)
        return F.cross_entropy(logits, labels)

    def on_fit_start(self) -> None:
        """Bring the teacher to the device."""
        for teacher in self._teacher:
            teacher.to(self.device)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Log the accuracy on one batch."""
        images, labels, skipped = batch
        self._report(skipped)
        accuracy = (self.network(images).argmax(1) == labels).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule, stepped every batch."""
        optimizer = self._optimizer()
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(self.settings.warmup_epochs * total / self.settings.epochs)
        kind = self.config.optimizer.schedule
        self._rate = lambda step: learning_rate_factor(step, warmup, total, kind)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _optimizer(self) -> torch.optim.Optimizer:
        settings, shared = self.settings, self.config.optimizer
        groups: Any = list(self._decaying_and_not(shared.decay))
        options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        if shared.name == "sgd":
            return torch.optim.SGD(groups, momentum=shared.momentum, **options)
        kind = torch.optim.Adam if shared.name == "adam" else torch.optim.AdamW
        return kind(groups, betas=(shared.momentum, 0.999), **options)

    def _decaying_and_not(self, decay: str) -> Iterator[dict[str, Any]]:
        """Yield the group of parameters with weight decay, and that without if there is one."""
        learned = [
            (name, one) for name, one in self.network.named_parameters() if one.requires_grad
        ]
        if decay == "all":
            yield {"params": [one for _, one in learned]}
            return
        kept = [("conv" in name or "fc" in name, one) for name, one in learned]
        yield {"params": [one for decays, one in kept if decays]}
        yield {"params": [one for decays, one in kept if not decays], "weight_decay": 0.0}

    def on_train_epoch_start(self) -> None:
        """Tell a stream the epoch."""
        loader = self.trainer.train_dataloader
        if hasattr(getattr(loader, "dataset", None), "set_epoch"):
            loader.dataset.set_epoch(self.current_epoch)  # type: ignore[union-attr]

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Start the clock of an epoch, or of what is left of it."""
        self._started = self._started or perf_counter()

    def on_train_epoch_end(self) -> None:
        """Log the means of the epoch and its last rate, and add it to the training time."""
        mean = self._loss_sum / self.position[1]
        if not torch.isfinite(mean):
            raise not_finite(self.network, None, mean, self.stage_number, self.position)
        self.log("train_loss", mean.float(), prog_bar=True, sync_dist=True)
        # Counts of all processes are added, because a mean of their shares is rounded differently.
        counts = torch.stack((self._right, torch.full_like(self._right, self._images)))
        right, images = self.trainer.strategy.reduce(counts, reduce_op="sum")
        self.log("train_accuracy", (right.double() / images).float(), sync_dist=True)
        self.log("lr", self.settings.lr * self._rate(self.trainer.global_step - 1))
        self._loss_sum, self._right = torch.zeros_like(mean), torch.zeros_like(self._right)
        self._images = 0
        self.position = (self.current_epoch + 1, 0)
        self._stop_clock()

    def _stop_clock(self) -> None:
        if self._started:
            self.seconds += perf_counter() - self._started
        self._started = 0.0

    def _report(self, skipped: tuple[str, ...]) -> None:
        """Warn of each image that cannot be read, once."""
        for line in skipped:
            if line not in self.skipped:
                self.skipped[line] = None
                warnings.warn(f"{line} It is left out.", stacklevel=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the config and the run's own state beside Lightning's."""
        self._stop_clock()
        checkpoint["biper_config"] = self.config.to_dict()
        checkpoint["biper_state"] = {
            "seconds": self.seconds,
            "position": list(self.position),
            "loss_sum": self._loss_sum.item(),
            "right": [int(self._right), self._images],
            "skipped": list(self.skipped),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the interrupted run."""
        state = checkpoint["biper_state"]
        self.seconds = state["seconds"]
        self.position = (state["position"][0], state["position"][1])
        self._loss_sum = torch.tensor(state["loss_sum"], dtype=torch.float64)
        right, self._images = state.get("right", (0, 0))
        self._right = torch.tensor(right)
        self.skipped = dict.fromkeys(state["skipped"])


class LatestState(Checkpoint):
    """Save Lightning's state after each epoch and, if wanted, every few steps.

    Args:
        path: file; the older one is replaced.
        every_steps: optimizer steps between two files, or None.
    """

    def __init__(self, path: Any, every_steps: int | None) -> None:
        self._path = path
        self._every_steps = every_steps
        self._saved_step = 0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after a step whose number is a multiple of `every_steps`."""
        step = trainer.global_step
        if self._every_steps is None or step % self._every_steps or step == self._saved_step:
            return
        if batch_idx + 1 == trainer.num_training_batches:
            return  # the end of the epoch follows, and saves
        self._saved_step = step
        trainer.save_checkpoint(self._path)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Save."""
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self._path)


def learning_rate_factor(step: int, warmup: int, total: int, schedule: str = "cosine") -> float:
    """Return the share of the peak rate at a step: linear to 1 in `warmup` steps, then to 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return {"cosine": 0.5 * (1 + cos(pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]
