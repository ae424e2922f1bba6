"""`biper demo`: its options and output on a tiny network, and the whole demo as a weekly test."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

import biper_engine
from biper_engine.bench import Budget, Comparison, Contest, Samples
from biper_engine.bench.threads import torch_threads
from biper_engine.cli.demo import DemoResult, LayerTimes
from biper_engine.cli.demo_command import _table
from biper_engine.cli.demo_plot import _accuracy, write_plot
from biper_engine.plotting import new_figure
from biper_engine.training import StageResult, TrainingConfig, TrainingResult
from biper_engine.training.examples import MemoryExamples

from .conftest import Biper, tiny_network

steps = sys.modules["biper_engine.cli.demo"]


def contest(batch: int, medians: dict[str, float]) -> Contest:
    samples = {name: Samples((ms,)) for name, ms in medians.items()}
    return Contest(batch=batch, samples=samples, reasons={}, differences={})


RESULT = DemoResult(
    architecture="cifar10/resnet20_1w1a",
    train_images=1297,
    test_images=500,
    train_epochs=22,
    train_seconds=60.0,
    float_accuracy=0.95,
    engine_accuracy=0.95,
    top1_equal=500,
    packed=18,
    layers=20,
    verified=True,
    layers_equal=18,
    layers_compared=18,
    logit_error=1e-6,
    reload_identical=True,
    float_bytes=1_000_000,
    file_bytes=90_000,
    comparison=Comparison(
        threads=2,
        settings={},
        contests=(
            contest(1, {"float, eager": 8.0, "float, torch.compile": 4.0, "engine": 1.0}),
            contest(64, {"float, eager": 80.0, "float, torch.compile": 40.0, "engine": 400.0}),
        ),
        machine={},
    ),
    resnet18=LayerTimes(float_conv=Samples((20.0,)), engine=Samples((1.6,))),
    backends=("cpu",),
)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the demo small: no training, a tiny network, twelve test images, one timed call."""
    model = tiny_network()
    model.input_shape = (3, 32, 32)
    stage = StageResult(
        path=Path("stage2.pt"), epochs=1, seconds=1.0, validation_accuracy=None, test_accuracy=0.5
    )

    def fit(config: TrainingConfig, output: Path, **options: object) -> TrainingResult:
        assert torch.get_num_threads() == 1
        return TrainingResult(output_dir=output, stage1=stage, stage2=stage)

    train, test = steps.data.digits()
    few = MemoryExamples(test.pixels[:12], test.labels()[:12])
    monkeypatch.setattr(steps, "fit_quietly", fit)
    monkeypatch.setattr(steps.data, "digits", lambda: (train, few))
    monkeypatch.setattr(biper_engine, "load_checkpoint", lambda path: model)
    monkeypatch.setattr(steps, "_BUDGET", Budget(seconds=0.0, fewest=1, most=1, warmup=0))
    monkeypatch.setattr(steps, "_COMPILED", False)


@pytest.mark.usefixtures("small")
def test_every_step_leaves_what_it_says(biper: Biper, tmp_path: Path) -> None:
    done = biper("demo", "-o", tmp_path)
    assert done.code == 0, done.err
    assert done.err == ""
    assert "first 1,297 train, last 12 test, unshuffled" in done.out
    assert "top-1 equal on 12 of 12" in done.out
    assert "Medians of calls in turn" in done.out
    values = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert values["ok"] is values["reload_identical"] is values["verified"] is True
    contests = values["comparison"]["batches"]
    assert [contest["batch"] for contest in contests] == [1, 12]
    assert all(set(c["contestants"]) == {"float, eager", "engine"} for c in contests)
    assert values["file_bytes"] == (tmp_path / "digits.biper").stat().st_size
    assert len(list((tmp_path / "digits").glob("*.png"))) == 20
    assert size_of(tmp_path / "digits" / "7_0.png") == (8, 8)
    assert size_of(tmp_path / "demo.png") == (1500, 630)


@pytest.mark.usefixtures("small")
def test_it_trains_with_one_thread_and_times_with_all(biper: Biper, tmp_path: Path) -> None:
    """The training is checked where the fixture stands for it."""
    with torch_threads(2):
        assert biper("demo", "-o", tmp_path).code == 0
        assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("small")
def test_a_difference_fails(biper: Biper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_same_in_new_process", lambda *arguments: False)
    done = biper("demo", "-o", tmp_path, "--json")
    assert done.code == 1
    values = json.loads(done.out)
    assert values["failures"] == ["the reloaded file gives different logits"]
    assert "Error: The demo failed: the reloaded file gives different logits." in done.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top1_equal": 499}, "top-1 is equal on 499 of 500 images only"),
        ({"verified": False, "layers_equal": 17}, "17 of 18 layers"),
        ({"reload_identical": False}, "different logits"),
    ],
)
def test_every_broken_demand_is_a_failure(changes: dict[str, object], message: str) -> None:
    assert RESULT.failures == []
    (failure,) = replace(RESULT, **changes).failures  # type: ignore[arg-type]
    assert message in failure


def test_the_plot_is_drawn_without_a_display(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    write_plot(RESULT, tmp_path / "demo.png")
    assert size_of(tmp_path / "demo.png") == (1500, 630)


@pytest.mark.parametrize(("equal", "bars"), [(500, 2), (498, 4)])
def test_the_plot_has_no_bars_of_one_thing_twice(equal: int, bars: int) -> None:
    axes = new_figure(3, 3).subplots()
    _accuracy(axes, replace(RESULT, top1_equal=equal, engine_accuracy=0.95 - (500 - equal) / 500))
    assert len(axes.patches) == bars  # right and wrong
    said = " ".join(text.get_text() for text in axes.texts)
    assert "95.0%: 475 right" in said
    assert ("alike" in said) == (equal == 500)


def test_the_demo_trains_less_than_the_recipe() -> None:
    recipe, full = steps.short_recipe(), TrainingConfig()
    epochs = recipe.stage1.epochs + recipe.stage2.epochs
    assert 2 * epochs < full.stage1.epochs + full.stage2.epochs
    changed = replace(recipe, batch_size=full.batch_size, stage1=full.stage1, stage2=full.stage2)
    assert changed == full


def printed(result: DemoResult) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(_table(result))
    return " ".join(console.export_text().split())


def test_the_table_has_a_row_for_every_rival_and_batch() -> None:
    text = printed(RESULT)
    assert "ms, batch 1, torch.compile 4.00 1.00 4.0 times faster" in text
    assert "ms, batch 64, eager 80.00 400.00 5.0 times slower" in text
    assert "ms, ResNet-18's 3x3 layers* 20.00 1.60 12.5 times faster" in text


def test_a_rival_that_did_not_run_is_reported() -> None:
    contests = (
        Contest(
            batch=1,
            samples={"float, eager": Samples((2.0,)), "engine": Samples((1.0,))},
            reasons={"float, torch.compile": "no compiler"},
            differences={},
        ),
    )
    comparison = replace(RESULT.comparison, contests=contests)
    text = printed(replace(RESULT, comparison=comparison, resnet18=None))
    assert "ms, batch 1, torch.compile did not run" in text
    assert "ResNet-18" not in text


@pytest.mark.weekly
def test_the_whole_demo(tmp_path: Path) -> None:
    program = "import sys; from biper_engine.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "demo", "-o", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["top1_equal"] == values["test_images"] == 500
    assert values["float_accuracy"] == values["engine_accuracy"] >= 0.95
    assert values["packed"] == 18
