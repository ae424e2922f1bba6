"""What may be put into the package, and what is written then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ship

import biper_engine
from biper_engine import models
from biper_engine.shipped import ModelCard
from biper_engine.training.report import read_run


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """Return a run with the engine of another training, as if it were its own."""
    folder = shutil.copytree(small_run, tmp_path / "run")
    shipped = ship.SHIPPED / "digits" / "resnet20_1w1a.biper"
    shutil.copy(shipped, folder / "model.biper")
    card = models.card("digits/resnet20_1w1a")
    verified = {
        "path": "model.biper",
        "bytes": (folder / "model.biper").stat().st_size,
        "sha256": card.sha256,
        "verified": True,
        "verified_images": 16,
        "accuracy": 0.5,
        "bytes_before": 100,
        "packed": 18,
        "layers": 20,
        "summary": "equal\nend to end no bit differs",
    }
    (folder / "verify.json").write_text(json.dumps(verified))
    return folder


def test_file_card_and_record_are_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, results = tmp_path / "package", tmp_path / "results"
    results.mkdir()
    words = [str(run), "digits/mine", "--machine", "here", "--seconds", "0"]
    assert ship.main([*words, "--package", str(out), "--results", str(results)]) == 0
    assert biper_engine.load(out / "digits" / "mine.biper").metadata is not None
    card = ModelCard.from_dict(json.loads((out / "digits" / "mine.json").read_text()))
    assert (card.name, card.accuracy, card.test_images) == ("digits/mine", 0.5, 16)
    assert "seed: 0" in card.recipe
    assert card.verified == "on 16 images: end to end no bit differs"
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
