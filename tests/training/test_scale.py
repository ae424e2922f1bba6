"""Several processes, accumulated and compiled steps, runs that stop within an epoch."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from biper_engine import NotFiniteError
from biper_engine.models import load_checkpoint
from biper_engine.training import RunOptions, StageConfig, TrainingConfig, fit
from biper_engine.training.module import StageModule
from tests.training.few_images import few_images

ROOT = Path(__file__).resolve().parents[2]
STAGE = StageConfig(epochs=2, lr=0.05, weight_decay=1e-3, tau=0.02)
CONFIG = TrainingConfig(stage1=STAGE, stage2=STAGE, batch_size=8, accumulate=2)
QUIET = RunOptions(progress_bar=False, accelerator="cpu", devices=1)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def few_digits():
    with few_images():
        yield


def states(folder):
    return [load_checkpoint(folder / f"stage{number}.pt").state_dict() for number in (1, 2)]


def differing(first, second):
    """Return the names of entries with other bits."""
    return {
        name
        for one, other in zip(states(first), states(second), strict=True)
        for name, value in one.items()
        if not torch.equal(value, other[name])
    }


@pytest.fixture(scope="module")
def whole(few_digits, one_thread, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    fit(config=CONFIG, output_dir=folder, options=QUIET)
    return folder


@pytest.mark.some(1)
@pytest.mark.parametrize(("stage", "epoch", "batch"), [(1, 0, 3), (1, 1, 5), (2, 1, 2)])
def test_a_run_that_stops_within_an_epoch_goes_on_there(
    whole, tmp_path, monkeypatch, stage, epoch, batch
):
    step, seen = StageModule.training_step, []

    def interrupted(self, images, index):
        if (self.stage_number, self.current_epoch, index) == (stage, epoch, batch):
            raise KeyboardInterrupt
        return step(self, images, index)

    def counted(self, images, index):
        seen.append((self.stage_number, self.current_epoch, index))
        return step(self, images, index)

    options = dataclasses.replace(QUIET, save_every_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(config=CONFIG, output_dir=tmp_path, options=options)
    monkeypatch.setattr(StageModule, "training_step", counted)
    fit(config=CONFIG, output_dir=tmp_path, resume=True, options=options)
    assert seen[0] == (stage, epoch, batch // 2 * 2)
    assert differing(whole, tmp_path) == set()
    for number in (1, 2):
        logs = [folder / "logs" / f"stage{number}" for folder in (whole, tmp_path)]
        for file in ("metrics.csv", "layers.csv", "predictions.json"):
            assert (logs[0] / file).read_text() == (logs[1] / file).read_text()


@pytest.mark.deep
def test_workers_do_not_change_the_run(whole, tmp_path):
    fit(config=CONFIG, output_dir=tmp_path, options=dataclasses.replace(QUIET, workers=2))
    assert differing(whole, tmp_path) == set()


@pytest.mark.parametrize("start", ["torchrun", pytest.param("lightning", marks=pytest.mark.weekly)])
@pytest.mark.deep
def test_two_processes_equal_one_that_averages_their_batches(whole, tmp_path, start):
    program = [str(ROOT / "tests" / "training" / "two_processes.py")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*(launcher if start == "torchrun" else []), *program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for folder, rest in (("two", ["1", "2"]), ("one", ["2", "1"])):
        used = words if folder == "two" else program
        done = subprocess.run(
            [sys.executable, *used, str(tmp_path / folder), *rest],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    names = differing(tmp_path / "one", tmp_path / "two")
    # Each process has running statistics of its own batches; those of the first one are kept.
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert {name.rpartition(".")[2] for name in names} <= statistics
    logs = [tmp_path / folder / "logs" / "stage2" / "metrics.csv" for folder in ("one", "two")]
    assert logs[0].read_text() == logs[1].read_text()


def test_half_precision_and_adam_train(tmp_path):
    stage = dataclasses.replace(STAGE, epochs=1, lr=0.001)
    optimizer = dataclasses.replace(CONFIG.optimizer, name="adamw", decay="weights")
    config = dataclasses.replace(
        CONFIG, stage1=stage, stage2=stage, optimizer=optimizer, precision="bf16-mixed"
    )
    result = fit(config=config, output_dir=tmp_path, options=QUIET)
    assert all(value.isfinite().all() for value in load_checkpoint(result.stage2.path).parameters())


@pytest.mark.weekly
def test_a_compiled_run_is_near_the_eager_one(tmp_path, monkeypatch):
    # Traced and differentiated as for any compiler, but without the minutes of Inductor.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    stage = dataclasses.replace(STAGE, epochs=1)
    config = dataclasses.replace(CONFIG, stage1=stage, stage2=stage)
    for name, compiled in (("eager", False), ("compiled", True)):
        options = dataclasses.replace(QUIET, compile=compiled)
        fit(config=config, output_dir=tmp_path / name, options=options)
    first, second = (states(tmp_path / name)[0] for name in ("eager", "compiled"))
    for name, value in first.items():
        # Three steps from the same start; sums are rounded in another order.
        torch.testing.assert_close(second[name], value, rtol=1e-2, atol=1e-2, msg=name)


class TestNotFinite:
    def test_the_layer_is_named_and_the_last_state_kept(self, tmp_path, monkeypatch):
        step = StageModule.training_step

        def poisoned(self, images, index):
            if (self.current_epoch, index) == (1, 2):
                with torch.no_grad():
                    self.network.layer2[0].bn1.bias.fill_(3e38)
                    self.network.layer2[0].bn1.weight.fill_(3e38)
            return step(self, images, index)

        monkeypatch.setattr(StageModule, "training_step", poisoned)
        with pytest.raises(NotFiniteError, match=r"stage 1 .* epoch 2, batch 3.*'layer2\.0\.bn1'"):
            fit(config=CONFIG, output_dir=tmp_path, options=QUIET)
        assert (tmp_path / "checkpoints" / "stage1.ckpt").exists()

    def test_a_bad_weight_is_named(self, tmp_path, monkeypatch):
        step = StageModule.training_step

        def poisoned(self, images, index):
            with torch.no_grad():
                self.network.layer1[1].conv2.weight[0, 0, 0, 0] = float("nan")
            return step(self, images, index)

        monkeypatch.setattr(StageModule, "training_step", poisoned)
        with pytest.raises(NotFiniteError, match=r"'layer1\.1\.conv2\.weight' has values"):
            fit(config=CONFIG, output_dir=tmp_path, options=QUIET)


class TestForeignState:
    @pytest.fixture
    def stopped(self, tmp_path, monkeypatch):
        step = StageModule.training_step

        def interrupted(self, images, index):
            if self.current_epoch == 1:
                raise KeyboardInterrupt
            return step(self, images, index)

        with monkeypatch.context() as patch:
            patch.setattr(StageModule, "training_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fit(config=CONFIG, output_dir=tmp_path, options=QUIET)
        return tmp_path / "checkpoints" / "stage1.ckpt"

    def change(self, path, name):
        if name == "damaged":
            path.write_bytes(path.read_bytes()[:1000])
        elif name == "foreign":
            torch.save({"state_dict": {}}, path)
        else:
            state = torch.load(path, weights_only=True)
            state["biper_config"]["batch_size"] = 99
            torch.save(state, path)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("damaged", "cannot be read as the state of a run"),
            ("foreign", "is not a state that this package saved"),
            ("other", "differs in batch_size"),
        ],
    )
    def test_it_is_refused_before_training(self, stopped, name, message):
        self.change(stopped, name)
        with pytest.raises(ValueError, match=message):
            fit(config=CONFIG, output_dir=stopped.parents[1], resume=True, options=QUIET)

    def test_a_config_that_is_none_is_refused(self, tmp_path):
        (tmp_path / "config.json").write_text("not json")
        with pytest.raises(ValueError, match=r"config\.json' is not JSON"):
            fit(config=CONFIG, output_dir=tmp_path, resume=True, options=QUIET)
