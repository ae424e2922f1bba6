"""The images of one stage: which are trained on, which measured, and how they become batches."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from biper_engine.errors import DataError
from biper_engine.metadata import Metadata
from biper_engine.training.config import RunOptions, TrainingConfig
from biper_engine.training.draws import stage_seed
from biper_engine.training.examples import Examples, MemoryExamples
from biper_engine.training.loader import Batch, BatchOrder, Preparation, loader, require_labels
from biper_engine.training.predictions import Predictions
from biper_engine.training.tables import Stream

__all__ = ["Feed"]

_EVALUATION_BATCH = 128
_MOST_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Data and settings from which loaders are made.

    Attributes:
        train: images to train on.
        held_out: images that are measured after each epoch and at the end, or None.
        test: images that are measured at the end, or None.
        metadata: preprocessing.
        num_classes: number of labels.
        config: batch size, augmentation, seed.
        options: number of workers.
        skipped: a line for each image that is known to be unreadable.
    """

    train: Examples | Stream
    held_out: Examples | Stream | None
    test: Examples | Stream | None
    metadata: Metadata
    num_classes: int
    config: TrainingConfig
    options: RunOptions
    skipped: tuple[str, ...] = ()

    @property
    def is_indexed(self) -> bool:
        """Whether any batch of an epoch can be read without those before it."""
        return not isinstance(self.train, Stream)

    def check(self) -> None:
        """Look at the data before anything is trained.

        Labels that are known without their images are all checked. Of data sets of the user, what
        is measured is read once, and the first images to train on.

        Raises:
            DataError: a part is empty, or an item is not what training can use.
        """
        if self.num_classes < 2:
            raise DataError(
                f"'{self.config.dataset}' has {self.num_classes} class; wanted two or more."
            )
        parts = {"training": self.train, "held-out": self.held_out, "test": self.test}
        for name, part in parts.items():
            if part is None or isinstance(part, Stream):
                continue
            if len(part) == 0:
                raise DataError(f"'{self.config.dataset}' has no {name} images. Add some.")
            if (labels := part.labels()) is not None:
                require_labels(labels, self.num_classes, f"Among the {name} images, a")
            if part.is_foreign:
                looked = islice(self._measured(part), 1 if part is self.train else None)
                deque(looked, maxlen=0)

    def summary(self) -> dict[str, Any]:
        """Return JSON values that tell this data from other data; no image is read for it."""
        parts = {"training": self.train, "held-out": self.held_out, "test": self.test}
        indexed = {name: one for name, one in parts.items() if isinstance(one, Examples)}
        return {
            "classes": self.num_classes,
            "class names": list(self.metadata.class_names or ()),
            **{f"{name} images": len(part) for name, part in indexed.items()},
            **{
                f"SHA-256 of the {name} labels": sha256(labels.numpy().tobytes()).hexdigest()
                for name, part in indexed.items()
                if (labels := part.labels()) is not None
            },
        }

    def training(
        self, stage: int, *, rank: int, world: int, epoch: int, start: int, pin_memory: bool
    ) -> DataLoader[Batch]:
        """Return the batches of one process from a given one on."""
        seed = stage_seed(self.config.seed, stage)
        preparation = self._preparation(seed)
        order = None
        if not isinstance(self.train, Stream):
            order = self._order(self.train, seed, rank, world, epoch, start)
        return loader(
            self.train,
            preparation,
            self.config.batch_size,
            order=order,
            epoch=epoch,
            rank=rank,
            world=world,
            workers=self._workers(self.train, training=True),
            pin_memory=pin_memory,
        )

    def validation(self) -> DataLoader[Batch] | None:
        """Return the batches that are measured after each epoch."""
        return None if self.held_out is None else self._measured(self.held_out)

    def batches_of_an_epoch(self, world: int) -> int:
        """Return how many batches each of `world` processes trains on in an epoch.

        Raises:
            DataError: there are too few images, or a stream whose length is unknown.
        """
        if not isinstance(self.train, Stream):
            return len(self._order(self.train, 0, 0, world, 0, 0))
        steps, config = self.config.steps_per_epoch, self.config
        if steps is None and self.train.count is None:
            raise DataError(
                f"Nobody knows how many images the stream '{config.dataset}' has. Set "
                "steps_per_epoch, the number of steps of one epoch."
            )
        whole = (self.train.count or 0) // (config.batch_size * world * config.accumulate)
        steps = steps or whole
        if steps < 1:
            raise DataError(
                f"The stream '{config.dataset}' has {self.train.count} images, less than one step "
                f"of {config.batch_size * world * config.accumulate}. Take a smaller batch_size."
            )
        return steps * config.accumulate

    def accuracy(self, network: nn.Module, part: Examples | Stream, device: torch.device) -> float:
        """Return the share of images in `part` that the network classifies correctly."""
        return self.predictions(network, part, device).accuracy

    @torch.no_grad()
    def predictions(
        self, network: nn.Module, part: Examples | Stream, device: torch.device
    ) -> Predictions:
        """Return what the network predicts on the images in `part`."""
        network.to(device).eval()
        found = Predictions()
        for images, labels, _ in self._measured(part):
            found.add(images, labels, network(images.to(device)).cpu(), self.metadata)
        if not found.images:
            raise DataError("There is no image to measure the accuracy on.")
        return found

    def sample(self, count: int) -> Batch:
        """Return the first images that are measured or, if none are, trained on."""
        part = next(one for one in (self.test, self.held_out, self.train) if one is not None)
        batch: Batch = next(iter(loader(part, self._preparation(None), count)))
        return batch

    def _measured(self, part: Examples | Stream) -> DataLoader[Batch]:
        workers = self._workers(part, training=False)
        return loader(part, self._preparation(None), _EVALUATION_BATCH, workers=workers)

    def _preparation(self, seed: int | None) -> Preparation:
        return Preparation(
            metadata=self.metadata,
            num_classes=self.num_classes,
            augment=None if seed is None else self.config.augment,
            seed=seed or 0,
            corrupt=self.config.corrupt,
        )

    def _order(
        self, train: Examples, seed: int, rank: int, world: int, epoch: int, start: int
    ) -> BatchOrder:
        steps, accumulate = self.config.steps_per_epoch, self.config.accumulate
        return BatchOrder(
            len(train),
            self.config.batch_size,
            seed=seed,
            rank=rank,
            world=world,
            multiple=accumulate,
            most=None if steps is None else steps * accumulate,
            epoch=epoch,
            start=start,
        )

    def _workers(self, part: Examples | Stream, *, training: bool) -> int:
        """Return the number of worker processes: none for what one process does faster."""
        if self.options.workers is not None:
            return self.options.workers
        in_memory = isinstance(part, MemoryExamples)
        if in_memory and (not training or not torch.cuda.is_available()):
            return 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return min(_MOST_WORKERS, cores or 1)
