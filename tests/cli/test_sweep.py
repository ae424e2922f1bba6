"""`biper train --sweep`: which runs are trained, and the table of what came of them."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from biper_engine import NotFiniteError, training
from biper_engine.cli import train as command
from biper_engine.training import TrainingConfig

from .conftest import Biper


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, small_run: Path) -> list[str]:
    """Copy the files of a small run instead of training, and note the names of the runs."""
    names: list[str] = []

    def fit(*, config: TrainingConfig, output_dir: Path, **options: Any) -> None:
        names.append(output_dir.name)
        if config.frequency == 7:
            output_dir.mkdir(parents=True)
            (output_dir / "config.json").write_text(json.dumps(config.to_dict()))
            raise NotFiniteError("The loss of stage 1 became nan.")
        shutil.copytree(small_run, output_dir, dirs_exist_ok=True)
        (output_dir / "config.json").write_text(json.dumps(config.to_dict()))

    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    return names


def sweep(biper: Biper, values: str, *words: object) -> Any:
    return biper("train", "--no-convert", "--sweep", f"frequency={values}", "-o", "sweep", *words)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_value_has_a_run_and_a_row(biper: Biper, trained: list[str]) -> None:
    done = sweep(biper, "5,20")
    assert done.code == 0, done.err
    assert trained == ["frequency=5", "frequency=20"]
    rows = [line.split() for line in done.out.splitlines() if line.endswith("finished")]
    assert [row[0] for row in rows] == ["5", "20"]
    assert done.out.splitlines()[-1] == "next: biper report sweep"
    assert "run 2 of 2: frequency=20" in done.err


def test_a_finished_run_is_not_repeated(biper: Biper, trained: list[str]) -> None:
    sweep(biper, "5,20")
    done = sweep(biper, "5,20,40", "--resume")
    assert done.code == 0, done.err
    assert trained == ["frequency=5", "frequency=20", "frequency=40"]
    assert "frequency=5, finished before" in done.err


def test_a_float_network_is_finished_without_a_file(biper: Biper, trained: list[str]) -> None:
    words = ("train", "--sweep", "architecture=cifar10/resnet20", "-o", "sweep")
    for more in ((), ("--resume",)):
        done = biper(*words, *more)
        assert done.code == 0, done.err
    assert trained == ["architecture=cifar10-resnet20"]


def test_a_run_that_was_begun_needs_resume(biper: Biper, trained: list[str]) -> None:
    sweep(biper, "20")
    done = sweep(biper, "5,20")
    assert done.code == 1
    assert "frequency=20' holds a training run" in done.err
    assert trained == ["frequency=20"]


def test_a_run_without_its_file_is_converted(
    biper: Biper, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[object] = []
    monkeypatch.setattr(command, "pack", packed.append)
    sweep(biper, "5")
    done = biper("train", "--sweep", "frequency=5", "-o", "sweep", "--resume")
    assert done.code == 0, done.err
    assert len(packed) == 1


def test_one_bad_loss_does_not_stop_the_others(biper: Biper, trained: list[str]) -> None:
    done = sweep(biper, "7,5")
    assert done.code == 1
    assert trained == ["frequency=7", "frequency=5"]
    assert "The loss of stage 1 became nan" in done.err
    assert "loss not finite" in " ".join(done.out.split())
    shutil.rmtree("sweep")
    values = json.loads(sweep(biper, "7,5", "--json").out)
    assert [one["problem"] for one in values["runs"]] == ["The loss of stage 1 became nan.", None]
    assert values["runs"][1]["name"] == "frequency=5"
    assert values["runs"][1]["quantization error"] > 0
    assert values["runs"][0]["stage 2 %"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "frequenzy=1,2"], "Did you mean 'frequency'?"),
        (["--sweep", "frequency=5", "-o", "run"], "holds a training run, not a sweep"),
        (["--sweep", "seed=1,x"], "wanted a whole number"),
    ],
)
def test_mistakes_end_before_training(
    biper: Biper, trained: list[str], words: list[str], message: str
) -> None:
    Path("run").mkdir()
    Path("run/config.json").write_text("{}")
    done = biper("train", *words)
    assert done.code == 1
    assert message in done.err
    assert trained == []


def test_a_frequency_is_not_swept_without_one(biper: Biper, trained: list[str]) -> None:
    done = sweep(biper, "5,20", "--model", "cifar10/birealnet18")
    assert done.code == 2
    assert "has none" in " ".join(done.err.split())


def test_report_is_a_command(biper: Biper, small_run: Path, tmp_path: Path) -> None:
    done = biper("report", small_run, "-o", tmp_path / "page.html", "--json")
    assert done.code == 0, done.err
    page = Path(json.loads(done.out)["path"])
    assert json.loads(done.out)["bytes"] == page.stat().st_size
    done = biper("report", tmp_path)
    assert done.code == 1
    assert "is not the folder of a training run" in done.err
