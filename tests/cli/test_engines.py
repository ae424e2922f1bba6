"""Trained networks of the package in commands that take a `.biper` file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from biper_engine.cli.convert import _default_output
from biper_engine.cli.sources import ModelSource, find_model, load_model
from biper_engine.errors import CheckpointError
from biper_engine.shipped import shipped_file

from .conftest import Biper

NAME = "digits/resnet20_1w1a"


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_images_are_classified_by_name(biper: Biper) -> None:
    Image.new("L", (8, 8), 0).save("black.png")
    done = biper("run", NAME, "black.png", "--json")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["images"][0]["top"]) == 5


def test_a_trained_network_is_inspected_and_verified_by_name(biper: Biper) -> None:
    facts = json.loads(biper("inspect", NAME, "--json").out)
    assert (facts["classes"], facts["stage"]) == (10, 2)
    assert facts["file_bytes"] < 200_000
    assert biper("inspect", NAME, "--stage", "2").code == 2
    assert biper("verify", NAME).code == 0


def test_a_file_of_the_same_name_goes_first(biper: Biper, tiny_bytes: bytes) -> None:
    Path("digits").mkdir()
    Path(NAME).write_bytes(tiny_bytes)
    done = biper("run", NAME, NAME)
    assert done.code == 1
    assert "image" in done.err
    with shipped_file(NAME) as path:
        shutil.copy(path, NAME)
    assert biper("verify", NAME).code == 0


def test_an_unknown_name_is_a_missing_file(biper: Biper) -> None:
    done = biper("verify", "digits/resnet21")
    assert done.code == 1
    assert "digits/resnet21" in done.err


def test_the_trained_network_itself_is_found_by_name() -> None:
    model = load_model(ModelSource(text=NAME))
    assert model.provenance.architecture == "cifar10/resnet20_1w1a"
    assert find_model(ModelSource(text=NAME)).provenance == model.provenance
    assert _default_output(ModelSource(text=NAME)) == Path("resnet20_1w1a.biper")
    with pytest.raises(CheckpointError, match="digits/resnet21"):
        load_model(ModelSource(text="digits/resnet21"))
