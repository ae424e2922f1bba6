"""`biper train`: options and output; tests/training tests training itself."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from biper_engine import training
from biper_engine.training import RunOptions, StageResult, TrainingConfig, TrainingResult

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


def test_json_is_all_of_stdout(biper: Biper, fit: FakeFit) -> None:
    values = json.loads(biper("train", "--json").out)
    assert values["stage2"]["path"] == "biper-train/stage2.pt"
    assert values["stage2"]["test_accuracy"] == 0.75
    assert values["next"] == "biper convert biper-train/stage2.pt"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "cifar10/resnet20"], "Did you mean 'cifar10/resnet20_1w1a'?"),
        (["--data", "digit"], "Did you mean 'digits'?"),
    ],
)
def test_errors(biper: Biper, tmp_path: Path, words: list[str], message: str) -> None:
    done = biper("train", "-o", tmp_path, *words)
    assert done.code == 1
    assert message in done.err
