"""The results of a training run, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biper_engine.errors import CheckpointError
from biper_engine.files import write_atomically

if TYPE_CHECKING:
    from biper_engine.training.feed import Feed

__all__ = ["StageResult", "TrainingResult", "read_json", "write_json"]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """One finished stage.

    Attributes:
        path: checkpoint for `models.load_checkpoint`.
        epochs: epochs trained.
        seconds: wall-clock training time, summed over interruptions.
        validation_accuracy: in [0, 1], on the held-out part; None when nothing was held out.
        test_accuracy: in [0, 1]; None when images were held out, so that no setting is chosen on
            the test images.
        skipped: a line for each training image that could not be read.
    """

    path: Path
    epochs: int
    seconds: float
    validation_accuracy: float | None
    test_accuracy: float | None
    skipped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values without the path; `from_dict` is the inverse."""
        return {
            "epochs": self.epochs,
            "seconds": self.seconds,
            "validation_accuracy": self.validation_accuracy,
            "test_accuracy": self.test_accuracy,
            "skipped": list(self.skipped),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: Path) -> StageResult:
        """Build from `to_dict` and the path of the checkpoint."""
        return cls(path=path, **{**values, "skipped": tuple(values.get("skipped", ()))})


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A finished run: both stages.

    Attributes:
        output_dir: with all files of the run.
        stage1: what the first stage gave.
        stage2: what the second one gave.
        feed: the data of the run.
    """

    output_dir: Path
    stage1: StageResult
    stage2: StageResult
    feed: Feed | None = field(default=None, compare=False, repr=False)

    @property
    def seconds(self) -> float:
        """Training time of both stages."""
        return self.stage1.seconds + self.stage2.seconds

    @property
    def epochs(self) -> int:
        """Epochs of both stages."""
        return self.stage1.epochs + self.stage2.epochs


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in `path`, or None if there is no such file.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of text that is not UTF-8
        raise CheckpointError(
            f"'{path}' is not JSON: {error}. It was not written by a training; use another "
            "output_dir, or delete it."
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"'{path}' has a {type(values).__name__}, wanted a JSON object.")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object so that `path` is never half written."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
