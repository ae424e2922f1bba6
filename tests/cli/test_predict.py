"""`biper predict`: the options and what is printed; tests/serving has the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import biper_engine
from biper_engine import serving

from .conftest import Biper

pq = pytest.importorskip("pyarrow.parquet", reason='pip install "biper-engine[serve]"')


def test_a_folder_becomes_a_table(biper: Biper, tiny: Path, photos: Path) -> None:
    done = biper("predict", tiny, "--images", photos, "--out", "results")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == ["3 images: 3 classified.", str(Path("results").absolute())]
    rows = pq.read_table("results").to_pylist()
    assert [row["image"] for row in rows] == ["a.png", "b.JPG", "deep/c.bmp"]
    again = biper("predict", tiny, "-i", photos, "-o", "results")
    assert again.out.startswith("3 images (3 by an earlier run): 3 classified.")


def test_answers_are_those_of_run(biper: Biper, tiny: Path, photos: Path) -> None:
    engine = biper_engine.load(tiny)
    engine.metadata = None
    engine.save("bare.biper")
    Path("names.txt").write_text("w\nx\ny\nz\n", encoding="utf-8")
    options = ("--mean", "0.1,0.2,0.3", "--std", 0.5, "--size", 20, "--labels", "names.txt")
    ran = json.loads(biper("run", "bare.biper", photos, "--top", 1, "--json", *options).out)
    done = biper("predict", "bare.biper", "-i", photos, "-o", "results", "--json", *options)
    assert json.loads(done.out) == {
        "out": str(Path("results").absolute()),
        **{"images": 3, "failed": 0, "continued": 0},
    }
    rows = pq.read_table("results").to_pylist()
    found = [(r["image"], r["class"], r["index"], pytest.approx(r["probability"])) for r in rows]
    expected = [(Path(r["image"]).relative_to(photos), r["top"][0]) for r in ran["images"]]
    assert found == [
        (path.as_posix(), top["class"], top["index"], top["probability"]) for path, top in expected
    ]


def test_images_that_cannot_be_read_are_counted(biper: Biper, tiny: Path, photos: Path) -> None:
    (photos / "deep/d.png").write_bytes(b"no image")
    done = biper("predict", tiny, "-i", photos, "-o", "results")
    assert done.code == 0
    assert done.out.startswith("4 images: 3 classified, 1 without a class; `error` says why.\n")


def test_ctrl_c_says_how_to_go_on(
    biper: Biper, tiny: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_words: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "predict", stopped)
    done = biper("predict", tiny, "-i", photos, "-o", "results")
    assert done.code == 130
    assert done.err == "Stopped. The same command goes on with what is in 'results'.\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tiny.biper", "-i", "gone", "-o", "x"), "There is no folder or file 'gone'"),
        (("gone.biper", "-i", "photos", "-o", "x"), "gone.biper"),
        (("tiny.biper", "-i", "photos", "-o", "photos"), "files that are not of a prediction"),
        (("tiny.biper", "-i", "photos", "-o", "x", "--mean", "1,2"), "--mean (=1,2) must be 3"),
    ],
)
def test_errors(
    biper: Biper, tiny: Path, photos: Path, words: tuple[str, ...], message: str
) -> None:
    done = biper("predict", *words)
    assert (done.code, done.out) == (1, "")
    assert message in done.err
