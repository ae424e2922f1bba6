"""Write Lightning's files atomically. Imports Lightning: import this inside functions only."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from biper_engine.files import write_atomically

__all__ = ["AtomicCheckpoints", "MetricsFile"]


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints through `write_atomically`.

    Lightning itself writes to the system's temporary folder and moves the file from there. Between
    file systems, the move copies over the older checkpoint, and a kill or a full disk during the
    copy loses both.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; an existing one stays intact until the new one is complete."""
        if storage_options is not None:
            raise TypeError("`storage_options` are for other checkpoint plugins; leave them out.")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: torch.save(checkpoint, file))


class MetricsFile(Logger):
    """A CSV file with a row for each logged step.

    A resumed run keeps the rows of earlier steps and replaces those of the steps that it repeats.

    Args:
        path: path of the file; its folder is created if missing.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                self._rows = [{**row, "step": int(row["step"])} for row in csv.DictReader(file)]

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self._path.stem

    @property
    def version(self) -> str:
        """Empty: there is one file for a stage."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing; the config has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of a step, and drop the rows of an interrupted run after it."""
        number = 0 if step is None else step
        self._rows = [row for row in self._rows if row["step"] <= number]
        if not self._rows or self._rows[-1]["step"] != number:
            self._rows.append({"step": number})
        self._rows[-1].update(metrics)

    @rank_zero_only
    def save(self) -> None:
        """Write the file."""
        if not self._rows:
            return
        names = dict.fromkeys(["epoch", "step", *(name for row in self._rows for name in row)])
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, lambda file: file.write(text.getvalue().encode()))
