"""What a run writes down about itself after each epoch, and at the end of a stage."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from biper_engine.metadata import Metadata
from biper_engine.models import load_checkpoint
from biper_engine.nn import binary_layers, weight_errors
from biper_engine.training import RunOptions, fit
from biper_engine.training.layer_history import _packed, _unpacked
from biper_engine.training.module import learning_rate_factor
from biper_engine.training.predictions import Predictions
from tests.training.few_images import few_images
from tests.training.small_run import SMALL_CONFIG, SMALL_STAGE

QUIET = RunOptions(progress_bar=False, accelerator="cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(name="run")
def the_small_run(small_run: Path) -> Path:
    return small_run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_flips_are_the_signs_that_differ(run: Path) -> None:
    before, after = (dict(binary_layers(load_checkpoint(run / f"stage{n}.pt"))) for n in (1, 2))
    told = rows(run / "logs" / "stage2" / "layers.csv")
    assert [row["epoch"] for row in told] == ["0"] * 18 + ["1"] * 18
    assert [row["layer"] for row in told[18:]] == list(after)
    for row in told[18:]:
        first, second = before[row["layer"]].weight_bits(), after[row["layer"]].weight_bits()
        counts = [int(one["flips"]) for one in told if one["layer"] == row["layer"]]
        changed = int((first != second).sum())
        assert abs(counts[0] - counts[1]) <= changed <= sum(counts)
        assert (changed - sum(counts)) % 2 == 0
        assert int(row["weights"]) == first.numel()
    assert sum(int(row["flips"]) for row in told) > 0


def test_the_errors_are_those_of_the_finished_network(run: Path) -> None:
    measured = weight_errors(load_checkpoint(run / "stage2.pt"))
    for row in rows(run / "logs" / "stage2" / "layers.csv")[18:]:
        error = measured[row["layer"]]
        assert float(row["quantization_error"]) == pytest.approx(error.error, rel=1e-4)
        assert float(row["official_error"]) == pytest.approx(error.official, rel=1e-4)
        assert float(row["closed_form"]) == pytest.approx(error.closed_form, rel=1e-4)


def test_an_epoch_has_loss_accuracy_rate_and_means_of_the_layers(run: Path) -> None:
    found = [row for row in rows(run / "logs" / "stage1" / "metrics.csv") if row["train_loss"]]
    assert [row["epoch"] for row in found] == ["0", "1"]
    for epoch, row in enumerate(found):
        assert float(row["train_accuracy"]) * 48 == pytest.approx(
            round(float(row["train_accuracy"]) * 48), abs=1e-4
        )
        factor = learning_rate_factor(3 * (epoch + 1) - 1, 3, 6)
        assert float(row["lr"]) == pytest.approx(SMALL_STAGE.lr * factor)
        layers = [
            one
            for one in rows(run / "logs" / "stage1" / "layers.csv")
            if one["epoch"] == row["epoch"]
        ]
        flips = sum(int(one["flips"]) for one in layers)
        assert float(row["sign_flips"]) == pytest.approx(
            flips / sum(int(one["weights"]) for one in layers)
        )
        mean = sum(float(one["quantization_error"]) for one in layers) / 18
        assert float(row["quantization_error"]) == pytest.approx(mean)


def test_the_predictions_are_those_of_the_accuracy(run: Path) -> None:
    told = Predictions.from_dict(json.loads((run / "logs/stage2/predictions.json").read_text()))
    result = json.loads((run / "result.json").read_text())["stage2"]
    assert told.images == 16
    assert told.accuracy == result["test_accuracy"]
    assert len(told.wrong) == 16 - round(16 * told.accuracy)


def test_a_network_of_another_paper_has_flips_only(tmp_path: Path) -> None:
    stage = dataclasses.replace(SMALL_STAGE, epochs=1)
    config = dataclasses.replace(SMALL_CONFIG, architecture="cifar10/adabin_resnet20", stage1=stage)
    with few_images():
        fit(config=dataclasses.replace(config, stage2=stage), output_dir=tmp_path, options=QUIET)
    told = rows(tmp_path / "logs" / "stage2" / "layers.csv")
    assert len(told) == 18
    assert {row["quantization_error"] for row in told} == {""}
    assert "quantization_error" not in rows(tmp_path / "logs/stage2/metrics.csv")[0]


@pytest.mark.parametrize("shape", [(0,), (1,), (8,), (3, 3), (2, 4, 5)])
def test_bits_survive_being_packed(shape: tuple[int, ...]) -> None:
    bits = torch.rand(shape) < 0.5
    packed = _packed(bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-bits.numel() // 8)
    assert torch.equal(_unpacked(packed, bits), bits)


METADATA = Metadata(input_size=(3, 8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def test_the_surest_wrong_images_are_kept_as_pictures() -> None:
    found = Predictions()
    for number in range(5):
        pixels = torch.full((10, 3, 8, 8), 10 * number / 255)
        logits = torch.zeros(10, 4)
        logits[:, 1] = 0.05 + 0.1 * torch.arange(10) + number
        found.add(pixels * 2 - 1, torch.full((10,), 1 if number == 4 else 3), logits, METADATA)
    assert found.images == 50
    assert found.accuracy == 0.2
    assert found.confusion == {(3, 1): 40, (1, 1): 10}
    assert len(found.wrong) == 24
    assert found.wrong[0].probability >= found.wrong[-1].probability
    assert {one.index for one in found.wrong} == set(range(16, 40))
    picture = Image.open(io.BytesIO(base64.b64decode(found.wrong[0].picture)))
    assert picture.size == (8, 8)
    assert {picture.getpixel((0, 0))} <= {10, 20, 30}
    assert Predictions.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_pictures_are_small_whatever_the_image() -> None:
    metadata = dataclasses.replace(METADATA, input_size=(3, 224, 224))
    found = Predictions()
    noise = torch.rand(2, 3, 224, 224) * 3 - 1
    noise[0, 0, 0, 0] = float("nan")
    found.add(noise, torch.tensor([0, 0]), torch.tensor([[0.0, 1.0]] * 2), metadata)
    assert {one.media_type for one in found.wrong} == {"image/jpeg"}
    assert all(len(one.picture) < 20_000 for one in found.wrong)
