"""`biper run`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import biper_engine
from biper_engine.preprocessing import image_to_tensor

from .conftest import Biper


def test_a_table_per_image(biper: Biper, tiny: Path, photos: Path) -> None:
    done = biper("run", tiny, photos / "a.png", photos / "deep", "--top", 2)
    assert done.code == 0
    assert done.err == ""
    assert done.out.count("softmax") == 2
    assert "photos/a.png" in done.out
    assert "photos/deep/c.bmp" in done.out


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
    ],
)
def test_errors(biper: Biper, tiny: Path, photos: Path, words: list[str], message: str) -> None:
    done = biper("run", tiny, *words)
    assert done.code == 1
    assert done.out == ""
    assert message in done.err
