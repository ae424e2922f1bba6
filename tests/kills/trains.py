"""Kill a training run, resume it, and compare it with one that was never killed."""

from __future__ import annotations

import csv
import json
import random
import shutil
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from biper_engine.models import load_checkpoint
from biper_engine.training import RunOptions, StageConfig, TrainingConfig, fit
from tests.kills.children import Child, FailedError, leftovers
from tests.training.few_images import few_images

__all__ = ["TrainTally", "kill_trains"]

_CONFIG = TrainingConfig(
    stage1=StageConfig(epochs=3, lr=0.1, weight_decay=1e-3, tau=0.02),
    stage2=StageConfig(epochs=3, lr=0.05, weight_decay=1e-4, tau=0.02),
    batch_size=12,
)
# States within epochs, too, so that a kill may come while one is written.
_OPTIONS = RunOptions(progress_bar=False, accelerator="cpu", devices=1, save_every_steps=1)
# Then a run may end, so that its result is seen.
_KILLS_OF_A_RUN = 5


@dataclass
class TrainTally:
    """How many kills in how many runs, and temporary files that kills left."""

    kills: int = 0
    runs: int = 0
    left: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills while training, in {self.runs} runs: every file was whole each "
            f"time, and every run ended with the bits of one that was not killed; {self.left} "
            "temporary files were left, and none in the end"
        )


def kill_trains(count: int, folder: Path, seed: int) -> TrainTally:
    """Kill as often as `count`, and let every run end.

    Raises:
        FailedError: a file was torn, a resumed run failed or gave other weights, or temporary files
            were left for good.
    """
    draw, tally = random.Random(seed), TrainTally()
    for name in ("lightning", "biper_engine.training.module"):  # children need not import them
        import_module(name)
    with few_images():
        start = time.monotonic()
        Child(lambda: _train(folder / "whole"), folder / "log").wait()
        seconds = time.monotonic() - start
        wanted = _result(folder / "whole")
        while tally.kills < count:
            run = folder / f"run{tally.runs}"
            for number in range(_KILLS_OF_A_RUN + 1):
                child = Child(lambda run=run: _train(run), folder / "log")
                if tally.kills == count or number == _KILLS_OF_A_RUN:
                    child.wait()
                    break
                if not child.kill_after(draw.uniform(0.0, 0.6 * seconds)):
                    break
                tally.kills += 1
                tally.left += len(leftovers(run))
                _check_whole(run)
            _compare(_result(run), wanted, run)
            tally.runs += 1
            shutil.rmtree(run)
    return tally


def _train(directory: Path) -> None:
    fit(config=_CONFIG, output_dir=directory, resume=True, options=_OPTIONS)


def _result(directory: Path) -> tuple[list[dict[str, torch.Tensor]], list[object]]:
    """Return both stages' weights, and their accuracies and logs."""
    states = [load_checkpoint(directory / f"stage{n}.pt").state_dict() for n in (1, 2)]
    measured = json.loads((directory / "result.json").read_text())
    logs = sorted((directory / "logs").rglob("*.csv"))
    accuracies = [measured[f"stage{n}"]["test_accuracy"] for n in (1, 2)]
    return states, [*accuracies, *(path.read_text() for path in logs)]


def _compare(got: object, wanted: object, run: Path) -> None:
    (states, measured), (wanted_states, wanted_measured) = got, wanted  # type: ignore[misc]
    for stage, (state, other) in enumerate(zip(states, wanted_states, strict=True), 1):
        for name, value in other.items():
            if state[name].numpy().tobytes() != value.numpy().tobytes():
                raise FailedError(f"{run.name}: {name} of stage {stage} has other bits")
    if measured != wanted_measured:
        raise FailedError(f"{run.name}: accuracies and logs {measured}, wanted {wanted_measured}")
    if left := leftovers(run):
        raise FailedError(f"temporary files stay after the run: {left}")


def _check_whole(run: Path) -> None:
    """Read every file that is there, but temporary ones."""
    for path in run.rglob("[!.]*"):
        try:
            if path.suffix == ".ckpt":
                torch.load(path, weights_only=False)
            elif path.suffix == ".pt":
                load_checkpoint(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".csv":
                _check_rows(path)
        except Exception as error:
            size = path.stat().st_size
            raise FailedError(f"a kill tore '{path}' ({size} bytes): {error}") from error


def _check_rows(path: Path) -> None:
    """Check that steps ascend, or, in a file of layers, that each epoch has all of them."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if path.name == "layers.csv":
        layers = list(dict.fromkeys(row["layer"] for row in rows))
        epochs = sorted({int(row["epoch"]) for row in rows})
        wanted = [(str(epoch), layer) for epoch in epochs for layer in layers]
        if not rows or [(row["epoch"], row["layer"]) for row in rows] != wanted:
            raise ValueError(f"epochs {epochs}, {len(rows)} rows, {len(layers)} layers")
        return
    steps = [int(row["step"]) for row in rows]
    if not steps or steps != sorted(set(steps)):
        raise ValueError(f"steps {steps}")
