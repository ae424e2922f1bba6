"""`biper run`."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import biper_engine
from biper_engine.cli.images import _share
from biper_engine.preprocessing import image_to_tensor

from .conftest import Biper


def test_a_line_per_image(biper: Biper, tiny: Path, photos: Path) -> None:
    done = biper("run", tiny, photos / "a.png", photos / "deep", "--top", 2)
    assert done.code == 0
    assert done.err == ""
    first, second = done.out.splitlines()
    assert re.fullmatch(r"photos/a\.png: \S+ \d+\.\d%, \S+ \d+\.\d%", first)
    assert second.startswith("photos/deep/c.bmp: ")


def logits_of(biper: Biper, *words: object) -> list[float]:
    (image,) = json.loads(biper("run", *words, "--top", 9, "--json").out)["images"]
    return [entry["logit"] for entry in sorted(image["top"], key=lambda entry: entry["index"])]


def test_the_user_says_what_the_file_lacks(biper: Biper, tiny: Path, photos: Path) -> None:
    engine = biper_engine.load(tiny)
    wanted = biper_engine.Metadata(
        input_size=(3, 16, 16), mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), crop_pct=16 / 20
    )
    tensor = image_to_tensor(photos / "a.png", wanted)
    engine.metadata = None
    engine.save(tiny)
    options = ("--mean", "0.1,0.2,0.3", "--std", 0.5, "--size", 20)
    logits = logits_of(biper, tiny, photos / "a.png", *options)
    assert logits == pytest.approx(engine(tensor[None])[0].tolist(), rel=1e-5)
    (photos / "names.txt").write_text("one\ntwo words\n\n[three]\nfour\n")
    done = biper("run", tiny, photos / "a.png", *options, "--labels", photos / "names.txt")
    assert done.code == 0
    assert all(name in done.out for name in ("one", "two words", "[three]", "four"))


def test_the_user_may_want_otherwise_than_the_file(biper: Biper, tiny: Path, photos: Path) -> None:
    before = logits_of(biper, tiny, photos / "a.png")
    assert logits_of(biper, tiny, photos / "a.png", "--mean", "0,0,0") == before
    assert logits_of(biper, tiny, photos / "a.png", "--mean", "0.9") != before
    assert logits_of(biper, tiny, photos / "a.png", "--size", 16) == before


@pytest.mark.parametrize("resized", range(16, 300, 7))
def test_a_size_is_the_length_of_the_resized_side(resized: int) -> None:
    share = _share(16, resized)
    assert 0 < share <= 1
    assert math.floor(16 / share) == resized


def test_the_answer_is_the_engine_s(biper: Biper, tiny: Path, photos: Path) -> None:
    done = biper("run", tiny, photos, "--top", 9, "--batch", 2, "--json")
    images = json.loads(done.out)["images"]
    assert [Path(row["image"]).name for row in images] == ["a.png", "b.JPG", "c.bmp"]
    engine = biper_engine.load(tiny)
    assert engine.metadata is not None
    assert engine.metadata.class_names is not None
    for row in images:
        logits = engine(image_to_tensor(row["image"], engine.metadata)[None])[0]
        best = int(logits.argmax())
        assert len(row["top"]) == 4
        assert row["top"][0]["index"] == best
        assert row["top"][0]["class"] == engine.metadata.class_names[best]
        assert row["top"][0]["logit"] == pytest.approx(float(logits[best]), rel=1e-5)
        assert sum(entry["probability"] for entry in row["top"]) == pytest.approx(1, rel=1e-5)


def test_a_class_without_a_name_is_its_index(biper: Biper, tiny: Path, photos: Path) -> None:
    engine = biper_engine.load(tiny)
    assert engine.metadata is not None
    engine.metadata = replace(engine.metadata, class_names=None)
    engine.save(tiny)
    top = json.loads(biper("run", tiny, photos / "a.png", "--json").out)["images"][0]["top"]
    assert all(entry["class"] == entry["index"] for entry in top)


def test_markup_in_a_class_name_is_shown(biper: Biper, tiny: Path, photos: Path) -> None:
    assert "[cat]" in biper("run", tiny, photos / "a.png").out


def test_a_network_that_is_not_a_classifier_is_refused(
    biper: Biper, tiny: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def feature_map(self: object, images: torch.Tensor) -> torch.Tensor:
        return images

    monkeypatch.setattr(biper_engine.Engine, "forward", feature_map)
    done = biper("run", tiny, photos / "a.png")
    assert done.code == 1
    assert "returns [1, 3, 16, 16], wanted logits [N, classes]" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos/notes.txt"], "Cannot read an image from 'photos/notes.txt'"),
        (["gone.png"], "no image or directory 'gone.png'"),
        (["photos", "--backend", "triton"], "cannot run here"),
        (["photos", "--mean", "0.1,0.2"], "--mean (=0.1,0.2) must be 3 numbers with commas"),
        (["photos", "--std", "a,b,c"], "--std (=a,b,c) must be 3 numbers with commas"),
        (["photos", "--std", "0"], "--std (=0) must be above 0"),
        (["photos", "--size", "8"], "--size (=8) is less than the 16 pixels"),
        (["photos", "--labels", "gone.txt"], "Cannot read --labels 'gone.txt': No such file"),
        (["photos", "--labels", "photos/a.png"], "--labels 'photos/a.png' is not text in UTF-8"),
        (["photos", "--labels", "photos/notes.txt"], "names, but the network has 4 classes"),
    ],
)
def test_errors(biper: Biper, tiny: Path, photos: Path, words: list[str], message: str) -> None:
    done = biper("run", tiny, *words)
    assert done.code == 1
    assert done.out == ""
    assert message in done.err
