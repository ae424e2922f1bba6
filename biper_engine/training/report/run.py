"""Read the folder of a training run, finished or not."""

from __future__ import annotations

import csv
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from biper_engine import models
from biper_engine.errors import CheckpointError
from biper_engine.files import sha256_of
from biper_engine.models import Network, registry
from biper_engine.nn import WeightError, weight_errors
from biper_engine.training.config import TrainingConfig
from biper_engine.training.predictions import Predictions
from biper_engine.training.result import StageResult, read_json

__all__ = ["LayerEpoch", "Run", "Stage", "is_run", "read_run"]

_CONFIG = "config.json"
# What every version of the package wrote; later settings have defaults that say how it was before.
_SETTINGS = (
    *("dataset", "architecture", "frequency", "stage1", "stage2"),
    *("batch_size", "seed", "hold_out", "precision"),
)


@dataclass(frozen=True, kw_only=True)
class LayerEpoch:
    """A row of `layers.csv`: one binary layer after one epoch."""

    epoch: int
    weights: int
    flips: int
    error: float | None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, as far as it was trained.

    Attributes:
        number: 1 or 2.
        wanted: epochs of the recipe.
        metrics: values of `metrics.csv` by name, for each epoch.
        layers: the rows of `layers.csv`, by layer.
        result: what was measured at its end, or None before that.
        predictions: on the measured images, or None if there are none.
        network: with the latest weights, or None if there are none yet.
        errors: quantization errors of these weights, by layer.
    """

    number: int
    wanted: int
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    layers: dict[str, list[LayerEpoch]] = field(default_factory=dict)
    result: StageResult | None = None
    predictions: Predictions | None = None
    network: Network | None = None
    errors: dict[str, WeightError] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """Epochs that were logged."""
        return max(self.metrics, default=-1) + 1

    @property
    def flips_per_weight(self) -> float | None:
        """How often the sign of a weight changed in the stage, on average."""
        rows = [row for layer in self.layers.values() for row in layer]
        weights = sum(layer[-1].weights for layer in self.layers.values())
        return sum(row.flips for row in rows) / weights if weights else None

    @property
    def error(self) -> float | None:
        """Mean of the quantization error over the layers."""
        found = [one.error for one in self.errors.values()]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run.

    Attributes:
        path: its folder.
        config: the recipe.
        versions: of Python and the libraries.
        stages: both.
        verified: what `biper train` found about its `.biper` file, or None.
        file: the `.biper` file, or None.
        file_is_verified: whether the file is the one that was verified.
    """

    path: Path
    config: TrainingConfig
    versions: dict[str, str]
    stages: tuple[Stage, Stage]
    verified: dict[str, Any] | None
    file: Path | None
    file_is_verified: bool

    @property
    def is_finished(self) -> bool:
        """Whether both stages are finished."""
        return all(stage.result is not None for stage in self.stages)

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        if self.is_finished:
            return "finished"
        stage = self.stages[0 if self.stages[0].result is None else 1]
        return f"not finished: stage {stage.number}, {stage.epochs} of {stage.wanted} epochs"

    @property
    def network(self) -> Network | None:
        """The network of the latest stage that has weights."""
        return self.stages[1].network or self.stages[0].network

    def class_name(self, label: int) -> str:
        """Return the name of a class, or its number."""
        networks = [stage.network for stage in self.stages if stage.network is not None]
        for metadata in (network.metadata for network in networks):
            names = None if metadata is None else metadata.class_names
            if names is not None and label < len(names):
                return names[label]
        return str(label)


def is_run(path: Path) -> bool:
    """Whether a folder has a training run in it."""
    return (path / _CONFIG).is_file()


def read_run(path: Path) -> Run:
    """Read the folder of a run.

    Raises:
        CheckpointError: it is not one, or a file of it is damaged.
    """
    values = read_json(path / _CONFIG)
    if values is None:
        raise _no_run(path)
    try:
        config = TrainingConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"'{path / _CONFIG}' has no settings of this version of biper_engine: {error}"
        ) from error
    missing = [name for name in _SETTINGS if name not in values]
    if missing:
        raise CheckpointError(
            f"'{path / _CONFIG}' does not say how the run was trained: it has no {missing[0]}. "
            "Restore the file, which training wrote; nothing is assumed in its place."
        )
    results = read_json(path / "result.json") or {}
    verified = _verified(path / "verify.json")
    file = path / "model.biper"
    same = file.is_file() and verified is not None
    return Run(
        path=path,
        config=config,
        versions=read_json(path / "versions.json") or {},
        stages=(_stage(path, 1, config, results), _stage(path, 2, config, results)),
        verified=verified,
        file=file if file.is_file() else None,
        file_is_verified=same
        and verified is not None
        and sha256_of(file) == verified.get("sha256"),
    )


def _no_run(path: Path) -> CheckpointError:
    hint = "Pass the folder that `biper train -o FOLDER` wrote."
    if not path.exists():
        return CheckpointError(f"There is no folder '{path}'. {hint}")
    if not path.is_dir():
        near = next((one for one in path.absolute().parents if is_run(one)), None)
        where = f"It lies in the run '{near}': pass that." if near else hint
        return CheckpointError(f"'{path}' is a file, not the folder of a training run. {where}")
    return CheckpointError(
        f"'{path}' is not the folder of a training run: it has no {_CONFIG}, and no folder in it "
        f"has one. {hint}"
    )


_VERIFIED: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("sha256", "path", "summary"), str),
    **dict.fromkeys(("bytes", "bytes_before", "packed", "layers", "verified_images"), int),
    **{"verified": bool, "accuracy": (float, int, type(None))},
}


def _verified(path: Path) -> dict[str, Any] | None:
    values = read_json(path)
    wrong = [] if values is None else [
        name for name, kind in _VERIFIED.items() if not isinstance(values.get(name), kind)
    ]  # fmt: skip
    if wrong:
        raise CheckpointError(
            f"'{path}' has no {wrong[0]} as this version of biper_engine writes it. Restore the "
            "file, or delete it: the page then says that the engine is not verified."
        )
    return values


def _stage(path: Path, number: int, config: TrainingConfig, results: Mapping[str, Any]) -> Stage:
    logs, checkpoint = path / "logs" / f"stage{number}", path / f"stage{number}.pt"
    finished = results.get(f"stage{number}") if checkpoint.exists() else None
    network = _network(path, number, config, finished is not None)
    predictions = None if finished is None else read_json(logs / "predictions.json")
    wanted = config.stage(number).epochs
    try:
        return Stage(
            number=number,
            wanted=wanted,
            metrics=_metrics(logs / "metrics.csv", wanted),
            layers=_layers(logs / "layers.csv", wanted),
            result=None if finished is None else StageResult.from_dict(finished, checkpoint),
            predictions=None if predictions is None else Predictions.from_dict(predictions),
            network=network,
            errors={} if network is None else weight_errors(network),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"Stage {number} of '{path}' has a file that training did not write: "
            f"{type(error).__name__}: {error}. Restore the run's files."
        ) from error


def _metrics(path: Path, wanted: int) -> dict[int, dict[str, float]]:
    """Return the values of each epoch; validation and training have rows of their own."""
    found: dict[int, dict[str, float]] = {}
    for row in _rows(path):
        values = {name: float(value) for name, value in row.items() if value}
        epoch, _ = _epoch(values.pop("epoch"), wanted), values.pop("step")
        found.setdefault(epoch, {}).update(values)
    return found


def _layers(path: Path, wanted: int) -> dict[str, list[LayerEpoch]]:
    found: dict[str, list[LayerEpoch]] = {}
    for row in _rows(path):
        error = row["quantization_error"]
        one = LayerEpoch(
            epoch=_epoch(row["epoch"], wanted),
            weights=int(row["weights"]),
            flips=int(row["flips"]),
            error=float(error) if error else None,
        )
        if not 0 <= one.flips <= one.weights or one.weights == 0:
            raise ValueError(f"{one.flips} of {one.weights} weights changed their sign")
        found.setdefault(row["layer"], []).append(one)
    return found


def _epoch(value: str | float, wanted: int) -> int:
    epoch = float(value)
    if not (0 <= epoch < wanted and epoch.is_integer()):
        raise ValueError(f"epoch {epoch:g} is none of the {wanted} of the recipe")
    return int(epoch)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _network(path: Path, number: int, config: TrainingConfig, finished: bool) -> Network | None:
    if finished:
        return models.load_checkpoint(path / f"stage{number}.pt")
    state = path / "checkpoints" / f"stage{number}.ckpt"
    return _unfinished(state, number, config) if state.exists() else None


def _unfinished(path: Path, number: int, config: TrainingConfig) -> Network:
    """Build the network of Lightning's state."""
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu", mmap=True)["state_dict"]
        prefix = "network."
        held = {
            key.removeprefix(prefix): value
            for key, value in stored.items()
            if key.startswith(prefix)
        }
        entry = registry.architecture(config.architecture)
        periodic = entry.frequency is not None
        network = models.build(
            config.architecture,
            num_classes=len(held[f"{entry.classifier}.weight"]),
            frequency=config.frequency if periodic else None,
            stage=number,
            weight_binarizer=config.weight_binarizer if periodic else None,
        )
        network.load_state_dict(held)
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"'{path}' cannot be read as the state of a run: {error}") from error
    return network.eval()
