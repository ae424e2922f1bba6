"""Small runs: 48 images, one or two epochs per stage."""

import csv
import dataclasses
import sys
from importlib.metadata import version

import pytest
import torch

from biper_engine.models import load_checkpoint
from biper_engine.training import (
    RunOptions,
    StageConfig,
    TrainingConfig,
    data,
    export_official,
    fit,
)
from biper_engine.training.examples import MemoryExamples
from biper_engine.training.module import StageModule, learning_rate_factor
from tests.fresh import fresh_run
from tests.training.few_images import few_images

QUIET = RunOptions(progress_bar=False, accelerator="cpu")
STAGE1 = StageConfig(epochs=2, lr=0.05, weight_decay=1e-3, tau=0.02)
STAGE2 = StageConfig(epochs=2, lr=0.02, weight_decay=1e-4, tau=0.03)
SWAPPED = dataclasses.replace(data.DIGITS_METADATA, class_names=tuple("1023456789"))
CONFIG = TrainingConfig(stage1=STAGE1, stage2=STAGE2, batch_size=16)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def few_digits():
    with few_images():
        yield


@pytest.fixture(scope="module")
def uninterrupted(few_digits, one_thread, tmp_path_factory):
    return fit(config=CONFIG, output_dir=tmp_path_factory.mktemp("whole"), options=QUIET)


def weights(path):
    return load_checkpoint(path).state_dict()


def same(first, second):
    return all(torch.equal(value, second[key]) for key, value in first.items())


def test_both_stages_leave_loadable_networks(uninterrupted):
    first = load_checkpoint(uninterrupted.stage1.path)
    second = load_checkpoint(uninterrupted.stage2.path)
    assert (first.provenance.stage, second.provenance.stage) == (1, 2)
    assert second.provenance.frequency == CONFIG.frequency
    assert second.metadata == data.DIGITS_METADATA
    assert second.layer1[0].conv1.tau.item() == pytest.approx(STAGE2.tau)
    assert uninterrupted.epochs == 4
    assert uninterrupted.seconds > 0
    assert 0 <= uninterrupted.stage2.test_accuracy <= 1
    assert uninterrupted.stage2.validation_accuracy is None


def test_config_and_measurements_are_in_the_checkpoints(uninterrupted):
    contents = torch.load(uninterrupted.stage2.path, weights_only=True)
    assert contents["config"].pop("versions")["torch"] == version("torch")
    assert TrainingConfig.from_dict(contents["config"]) == CONFIG
    assert contents["metrics"] == uninterrupted.stage2.to_dict()
    state = uninterrupted.output_dir / "checkpoints" / "stage1.ckpt"
    assert torch.load(state, weights_only=False)["biper_config"] == CONFIG.to_dict()


def test_losses_are_logged_by_epoch(uninterrupted):
    with (uninterrupted.output_dir / "logs" / "stage1" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train_loss"]]
    assert [row["epoch"] for row in rows] == ["0", "1"]


@pytest.mark.some(1)
@pytest.mark.parametrize(("stage", "epoch"), [(1, 1), (2, 0), (2, 1)])
def test_interrupted_run_resumes_to_the_same_weights(
    uninterrupted, tmp_path, monkeypatch, stage, epoch
):
    step = StageModule.training_step

    def interrupted_step(self, batch, batch_index):
        if (self.stage_number, self.current_epoch, batch_index) == (stage, epoch, 1):
            raise KeyboardInterrupt
        return step(self, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            fit(config=CONFIG, output_dir=tmp_path, options=QUIET)
    assert (tmp_path / "stage1.pt").exists() == (stage == 2)

    resumed = fit(config=CONFIG, output_dir=tmp_path, resume=True, options=QUIET)
    assert same(weights(uninterrupted.stage1.path), weights(resumed.stage1.path))
    assert same(weights(uninterrupted.stage2.path), weights(resumed.stage2.path))
    assert resumed.stage2.test_accuracy == uninterrupted.stage2.test_accuracy
    for name in ("stage1", "stage2"):
        logs = [result.output_dir / "logs" / name for result in (uninterrupted, resumed)]
        for file in ("metrics.csv", "layers.csv", "predictions.json"):
            assert (logs[0] / file).read_text() == (logs[1] / file).read_text()


def test_finished_run_resumes_to_its_result(uninterrupted, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("lightning.Trainer.fit", never)
    again = fit(config=CONFIG, output_dir=uninterrupted.output_dir, resume=True, options=QUIET)
    assert again == uninterrupted


def test_resume_with_another_config_is_refused(uninterrupted):
    other = dataclasses.replace(CONFIG, seed=7, batch_size=8)
    with pytest.raises(ValueError, match="batch_size was 16, now 8; seed was 0, now 7"):
        fit(config=other, output_dir=uninterrupted.output_dir, resume=True, options=QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 11}, "classes: 10, now 11"),
        ({"metadata": SWAPPED}, "class names"),
        ({"test": 12}, "test images: 16, now 12"),
        ({"train": "labels"}, "SHA-256 of the training labels"),
    ],
)
def test_resume_with_other_data_is_refused(uninterrupted, monkeypatch, change, message):
    known = data.load(CONFIG, data.DIGITS_METADATA)
    if "test" in change:
        change = {"test": data.select(known.test, range(12))}
    if "train" in change:
        change = {"train": MemoryExamples(known.train.pixels, known.train.labels().flip(0))}
    other = dataclasses.replace(known, **change)
    monkeypatch.setitem(data._DATASETS, "digits", lambda config, task: other)
    with pytest.raises(ValueError, match=f"holds a run with other data: .*{message}"):
        fit(config=CONFIG, output_dir=uninterrupted.output_dir, resume=True, options=QUIET)


@pytest.mark.parametrize(
    "option",
    [{"devices": 0}, {"strategy": "bogus"}, {"accelerator": "bogus"}],
)
def test_devices_that_are_not_here_are_refused_before_anything_is_written(tmp_path, option):
    options = dataclasses.replace(QUIET, **option)
    with pytest.raises(ValueError, match=f"Lightning cannot train with .*{next(iter(option))}="):
        fit(config=CONFIG, output_dir=tmp_path / "a", options=options)
    config = dataclasses.replace(CONFIG, precision="bogus")
    with pytest.raises(ValueError, match="precision='bogus'"):
        fit(config=config, output_dir=tmp_path / "a", options=QUIET)
    assert not (tmp_path / "a").exists()


def test_directory_with_a_run_is_not_overwritten(uninterrupted):
    with pytest.raises(FileExistsError, match="resume=True"):
        fit(config=CONFIG, output_dir=uninterrupted.output_dir, options=QUIET)


def test_held_out_run_measures_on_the_held_out_part_only(tmp_path):
    stage = dataclasses.replace(STAGE1, epochs=1)
    config = dataclasses.replace(CONFIG, stage1=stage, stage2=stage, hold_out=True)
    options = dataclasses.replace(QUIET, tensorboard=True)
    result = fit(config=config, output_dir=tmp_path, resume=True, options=options)
    assert result.stage2.test_accuracy is None
    assert 0 <= result.stage2.validation_accuracy <= 1
    (events,) = (tmp_path / "logs" / "stage1" / "tensorboard").glob("events*")
    assert b"sign_flips/layer1.0.conv1" in events.read_bytes()


def test_unknown_dataset_and_network_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown dataset 'mnis'.* Did you mean 'mnist'"):
        fit(config=TrainingConfig(dataset="mnis"), output_dir=tmp_path / "a", options=QUIET)
    with pytest.raises(ValueError, match="Unknown network 'resnet'"):
        fit(config=TrainingConfig(architecture="resnet"), output_dir=tmp_path / "a", options=QUIET)
    assert not (tmp_path / "a").exists()


def test_a_network_for_images_of_another_size_is_refused_before_anything_is_written(tmp_path):
    config = TrainingConfig(architecture="imagenet/resnet18_1w1a")
    with pytest.raises(ValueError, match=r"takes images of 3x224x224.*'digits' are 3x32x32.*cifar"):
        fit(config=config, output_dir=tmp_path / "a", options=QUIET)
    assert not (tmp_path / "a").exists()


def test_a_finished_run_can_be_exported_for_the_official_code(uninterrupted):
    paths = export_official(uninterrupted)
    for path, stage in zip(paths, (uninterrupted.stage1, uninterrupted.stage2), strict=True):
        exported, own = load_checkpoint(path), load_checkpoint(stage.path)
        assert exported.provenance == own.provenance
        assert same(own.state_dict(), exported.state_dict())
        contents = torch.load(path, weights_only=True)
        assert contents["best_prec1"] == pytest.approx(100 * stage.test_accuracy)
    assert [path.parent.name for path in paths] == ["stage1", "stage2"]
    lines = (paths[1].parent / "config.txt").read_text().splitlines()
    assert {"dataset:  digits", "tau:  0.03", "lr:  0.02", "stage2:  True"} <= set(lines)


@pytest.mark.parametrize("name", ["lightning", "sklearn"])
def test_missing_extra_says_how_to_install_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "biper-engine\[train\]"'):
        fit(config=CONFIG, output_dir=tmp_path, options=QUIET)


def test_random_state_of_the_caller_is_kept(tmp_path):
    stage = dataclasses.replace(STAGE1, epochs=1)
    config = dataclasses.replace(CONFIG, stage1=stage, stage2=stage)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fit(config=config, output_dir=tmp_path, options=QUIET)
    assert torch.equal(torch.rand(1), expected)


def test_models_and_training_import_without_the_extra():
    code = (
        "import sys, biper_engine.models, biper_engine.training\n"
        "loaded = {'lightning', 'sklearn', 'PIL', 'tensorboard'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = fresh_run(code)
    assert done.returncode == 0, done.stderr


def test_learning_rate_warms_up_and_falls_to_zero():
    factors = [learning_rate_factor(step, 4, 20) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.02
