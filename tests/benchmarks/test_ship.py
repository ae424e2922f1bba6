"""What may be put into the package, and what is written then."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import ship
import torch
from PIL import Image

import biper_engine
from biper_engine import models
from biper_engine.files import sha256_of
from biper_engine.models import signs_file
from biper_engine.shipped import ModelCard
from biper_engine.training.report import read_run
from tests.training.few_images import few_images


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """Return a run with an engine, as `biper train` leaves it; the engine is of other weights."""
    folder = shutil.copytree(small_run, tmp_path / "run")
    shutil.copy(ship.SHIPPED / "digits" / "resnet20_1w1a.biper", folder / "model.biper")
    verify_as(folder)
    return folder


def verify_as(folder: Path) -> None:
    verified = {
        "path": "model.biper",
        "bytes": (folder / "model.biper").stat().st_size,
        "sha256": sha256_of(folder / "model.biper"),
        "verified": True,
        "verified_images": 16,
        "accuracy": 0.5,
        "bytes_before": 100,
        "packed": 18,
        "layers": 20,
        "summary": "equal\nend to end no bit differs",
    }
    (folder / "verify.json").write_text(json.dumps(verified))


@pytest.mark.deep
def test_file_card_and_record_are_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = models.load_checkpoint(run / "stage2.pt")
    engine = biper_engine.convert(trained, torch.zeros(2, 3, 32, 32), check=False)
    engine.save(run / "model.biper")
    verify_as(run)
    out, results = tmp_path / "package", tmp_path / "results"
    results.mkdir()
    words = [str(run), "digits/mine", "--machine", "here", "--seconds", "0"]
    with few_images(size=32):
        assert ship.main([*words, "--package", str(out), "--results", str(results)]) == 0
    assert biper_engine.load(out / "digits" / "mine.biper").metadata is not None
    card = ModelCard.from_dict(json.loads((out / "digits" / "mine.json").read_text()))
    assert (card.name, card.accuracy, card.test_images) == ("digits/mine", 0.5, 16)
    assert card.weights_sha256 == sha256_of(out / "digits" / "mine.safetensors")
    assert card.samples_sha256 == sha256_of(out / "digits" / "mine.png")
    assert "seed: 0" in card.recipe
    assert card.verified.startswith("on 16 images: end to end no bit differs; the network's class")
    rebuilt = signs_file.read_signs(out / "digits" / "mine.safetensors")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(rebuilt(images), trained(images))
    with Image.open(out / "digits" / "mine.png") as strip:
        assert strip.size == (320, 32)
    record = json.loads((results / "trained-digits-mine-here.json").read_text())
    assert record["card"] == card.to_dict()
    assert len(record["stage2"]["epochs"]) == 2
    assert len(record["stage2"]["quantization"]) == 18
    assert "digits/mine" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["digits", "digits/", "../x", "a/b/c"])
def test_a_name_has_two_parts(run: Path, name: str) -> None:
    with pytest.raises(ValueError, match="must be data/network"):
        ship.checked(read_run(run), name)


def test_a_run_without_a_verified_file_is_refused(run: Path) -> None:
    (run / "model.biper").write_bytes(b"another one")
    with pytest.raises(ValueError, match=r"has no verified model\.biper"):
        ship.checked(read_run(run), "digits/mine")


def test_a_data_set_without_a_description_is_refused(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "dataset": "photos"}))
    with pytest.raises(ValueError, match="Describe the data set 'photos'"):
        ship.checked(read_run(run), "photos/mine")


def test_the_engine_of_another_network_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "package"
    with few_images(size=32), pytest.raises(SystemExit):
        ship.main([str(run), "digits/mine", "--machine", "here", "--package", str(out)])
    assert re.search(r"gives other classes|was not made of", capsys.readouterr().err)
    assert not list(out.rglob("*.biper"))


@pytest.mark.parametrize("dataset", ["fashion-mnist", "fashion_mnist"])
def test_each_way_to_write_a_data_set_is_known(run: Path, dataset: str) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "dataset": dataset}))
    assert ship.data_name(read_run(run)) in ship.DATA


def test_the_page_has_a_place_for_the_cards() -> None:
    assert ship.CARDS.search(ship.PAGE.read_text("utf-8")) is not None
