"""`biper train`: options and output; tests/training tests training itself."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import biper_engine
from biper_engine import training
from biper_engine.cli import train as command
from biper_engine.training import (
    RunOptions,
    StageResult,
    TrainingConfig,
    TrainingResult,
    read_recipe,
)

from .conftest import Biper


class FakeFit:
    """Records how it was called, and prints to stdout as a trainer may."""

    config: TrainingConfig
    options: dict[str, Any]

    def __call__(
        self, *, config: TrainingConfig, output_dir: Path, **options: Any
    ) -> TrainingResult:
        print("trainer's chatter")
        self.config, self.options = config, options
        stages = [
            StageResult(
                path=output_dir / f"stage{number}.pt",
                epochs=3,
                seconds=1.5,
                validation_accuracy=0.5 if config.hold_out else None,
                test_accuracy=None if config.hold_out else 0.75,
            )
            for number in (1, 2)
        ]
        return TrainingResult(output_dir=output_dir, stage1=stages[0], stage2=stages[1])


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> FakeFit:
    fake = FakeFit()
    monkeypatch.setattr(training, "fit", fake)
    monkeypatch.setattr(command, "pack", lambda result: None)
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    return fake


def test_the_defaults_are_those_of_the_library(biper: Biper, fit: FakeFit) -> None:
    done = biper("train")
    assert done.code == 0
    assert fit.config == TrainingConfig()
    assert fit.options["options"] == RunOptions(progress_bar=False)
    assert fit.options["resume"] is False
    assert "75.00% of test images right" in done.out
    assert "biper-train/stage1.pt" in done.out
    assert done.out.splitlines()[-1] == "next: biper convert biper-train/stage2.pt"
    assert done.err == "trainer's chatter\n"


def test_options_reach_the_trainer(biper: Biper, fit: FakeFit) -> None:
    words = "--model cifar10/vgg_small_1w1a --stage1-epochs 5 --stage2-epochs 6 --frequency 20"
    more = "--batch-size 8 --seed 3 --precision bf16-mixed --hold-out --resume --devices 2"
    done = biper("train", *words.split(), *more.split(), "--tensorboard", "-o", "there")
    config, options = fit.config, fit.options["options"]
    assert config.architecture == "cifar10/vgg_small_1w1a"
    assert (config.stage1.epochs, config.stage2.epochs) == (5, 6)
    assert (config.frequency, config.batch_size, config.seed) == (20.0, 8, 3)
    assert (config.precision, config.hold_out) == ("bf16-mixed", True)
    assert (options.devices, options.tensorboard, fit.options["resume"]) == (2, True, True)
    assert "50.00% of held-out training images right" in done.out


def test_an_export_is_asked_for(
    biper: Biper, fit: FakeFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(result: TrainingResult) -> tuple[Path, Path]:
        assert result.stage2.epochs == 3
        return Path("official/1"), Path("official/2")

    monkeypatch.setattr(training, "export_official", export)
    assert "official" not in biper("train").out
    assert "for the official code: official/2" in biper("train", "--export-official").out
    values = json.loads(biper("train", "--export-official", "--json").out)
    assert values["official"] == ["official/1", "official/2"]


def test_an_interrupted_run_says_how_to_go_on(
    biper: Biper, fit: FakeFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(**_: Any) -> TrainingResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", interrupted)
    monkeypatch.setattr(sys, "argv", ["biper", "train", "-o", "my run"])
    done = biper("train", "-o", "my run")
    assert done.code == 130
    assert done.err.endswith("To go on:\n  biper train -o 'my run' --resume\n")
    assert "Traceback" not in done.err


def test_json_is_all_of_stdout(biper: Biper, fit: FakeFit) -> None:
    values = json.loads(biper("train", "--json").out)
    assert values["stage2"]["path"] == "biper-train/stage2.pt"
    assert values["stage2"]["test_accuracy"] == 0.75
    assert values["next"] == "biper convert biper-train/stage2.pt"


def test_a_float_twin_gets_no_engine(biper: Biper, fit: FakeFit) -> None:
    done = biper("train", "--model", "cifar10/resnet20")
    assert done.code == 0
    assert done.out.splitlines()[-1] == "No engine: the network has no binary layer."
    values = json.loads(biper("train", "--model", "cifar10/resnet20", "--json").out)
    assert (values["file"], values["next"]) == (None, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "cifar10/resnet20_1w1b"], "Did you mean 'cifar10/resnet20_1w1a'?"),
        (["--data", "digit"], "Did you mean 'digits'?"),
    ],
)
def test_errors(biper: Biper, tmp_path: Path, words: list[str], message: str) -> None:
    done = biper("train", "-o", tmp_path, *words)
    assert done.code == 1
    assert message in done.err


def test_a_recipe_is_chosen_by_its_name_or_the_data(biper: Biper, fit: FakeFit) -> None:
    biper("train", "fashion_mnist", "--data-dir", "here")
    assert fit.config == replace(read_recipe("fashion_mnist"), data_dir="here")
    biper("train", "--data", "photos", "--set", "optimizer.lr=0.01", "--batch-size", "8")
    assert (fit.config.dataset, fit.config.stage2.lr) == ("photos", 0.01)
    assert fit.config == replace(
        read_recipe("folder", ["optimizer.lr=0.01"]), dataset="photos", batch_size=8
    )


def test_the_merged_recipe_is_printed_and_can_be_used(
    biper: Biper, fit: FakeFit, tmp_path: Path
) -> None:
    done = biper("train", "cifar10_resnet18", "--set", "seed=5", "--print-recipe")
    (tmp_path / "mine.yaml").write_text(done.out)
    biper("train", tmp_path / "mine.yaml")
    assert fit.config == read_recipe("cifar10_resnet18", ["seed=5"])
    assert "seed: 5" in biper("train", "--set", "seed=5").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonesuch"], "There is no recipe 'nonesuch'"),
        (["--set", "optimizer.lrr=1"], "Did you mean 'optimizer.lr'?"),
        (["--data", "/no/folder"], "There is no file or folder of this name"),
        (["fashion_mnist", "--data-dir", "/no/folder"], "Debian's package dataset-fashion-mnist"),
        (["-o", __file__], "there is a file of the name"),
    ],
)
def test_mistakes_end_before_training(
    biper: Biper, tmp_path: Path, words: list[str], message: str
) -> None:
    done = biper("train", "-o", tmp_path / "run", *words)
    assert done.code == 1
    assert message in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.deep
@pytest.mark.usefixtures("one_thread")
def test_a_folder_of_images_becomes_a_verified_file(biper: Biper, tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for one in range(6):
            picture = Image.new("L", (9, 8), 40 * one + 90 * number % 256)
            picture.save(tmp_path / "photos" / name / f"{one}.png")
    (tmp_path / "photos" / "cat" / "bad.png").write_bytes(b"bad")
    words = ("--set", "batch_size=4", "--stage1-epochs", "1", "--stage2-epochs", "1")
    run = tmp_path / "run"
    options = ("--accelerator", "cpu", "--devices", "1", "--json")
    done = biper("train", "--data", tmp_path / "photos", *words, *options, "-o", run)
    assert done.code == 0, done.err
    assert "bad.png" in done.err
    assert "bad.png" in json.loads(done.out)["stage1"]["skipped"][0]
    values = json.loads(done.out)
    assert values["file"]["verified"] is True
    assert values["file"]["packed"] == 18
    assert values["file"]["accuracy"] is not None
    engine = biper_engine.load(run / "model.biper")
    assert engine.metadata.class_names == ("cat", "dog")
    stored = torch.load(run / "stage2.pt", weights_only=True)
    assert stored["config"]["batch_size"] == 4
    assert stored["config"]["versions"]["torch"] == torch.__version__
    assert values["next"].startswith("biper run")
