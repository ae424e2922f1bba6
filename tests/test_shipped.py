"""The trained networks in the package are what their cards say."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import biper_engine
from biper_engine import models
from biper_engine.models import ModelCard
from biper_engine.runtime import program_section
from biper_engine.serialization import check_program, replay
from biper_engine.training import read_recipe
from biper_engine.training.data import DIGITS_METADATA, digits, tensors

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "biper_engine" / "shipped"


def test_each_file_has_a_card_weights_images_and_a_record() -> None:
    files = {path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.biper")}
    for others in ("json", "safetensors", "png"):
        found = {path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob(f"*.{others}")}
        assert found == files
    assert set(models.shipped()) == {path.as_posix() for path in files}
    listed = (ROOT / "benchmarks" / "results" / "README.md").read_text("utf-8")
    for name in models.shipped():
        (record,) = (ROOT / "benchmarks" / "results").glob(f"trained-{name.replace('/', '-')}-*")
        assert json.loads(record.read_text("utf-8"))["card"] == models.card(name).to_dict()
        assert f"`{record.name}`" in listed


@pytest.mark.parametrize("name", models.shipped())
def test_a_card_tells_of_its_file(name: str, tmp_path: Path) -> None:
    card, file = models.card(name), FOLDER / f"{name}.biper"
    assert card.name == name
    assert ModelCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    assert card.bytes == file.stat().st_size < 200_000
    sums = {".biper": card.sha256, ".safetensors": card.weights_sha256, ".png": card.samples_sha256}
    for suffix, wanted in sums.items():
        found = file.with_suffix(suffix).read_bytes()
        assert hashlib.sha256(found).hexdigest() == wanted
    assert card.architecture in models.available()
    (tmp_path / "recipe.yaml").write_text(card.recipe)
    assert read_recipe(str(tmp_path / "recipe.yaml")).architecture == card.architecture
    text = str(card)
    assert all(part in text for part in (f"{card.accuracy:.2%}", card.latency.processor))


NAME = "digits/resnet20_1w1a"
READERS = {".biper": models.load, ".safetensors": models.pretrained, ".png": models.samples}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the files of a network, without their ends, where they may be damaged."""
    shutil.copytree(FOLDER / "digits", tmp_path / "digits")
    monkeypatch.setattr(biper_engine.shipped, "_folder", lambda: tmp_path)
    return tmp_path / NAME


def flipped(contents: bytes) -> bytes:
    """Flip a bit in the middle: of a weight, or of a pixel."""
    place = len(contents) // 2
    return contents[:place] + bytes([contents[place] ^ 1]) + contents[place + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda old: old[:-1], lambda _: b""])
@pytest.mark.parametrize("suffix", READERS)
def test_a_damaged_file_is_refused_in_a_sentence(
    package: Path, suffix: str, damage: Callable[[bytes], bytes]
) -> None:
    file = package.with_suffix(suffix)
    READERS[suffix](NAME)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(biper_engine.FileFormatError) as raised:
        READERS[suffix](NAME)
    assert str(raised.value) == (
        f"'{file}' is damaged, or of another version of biper_engine: its SHA-256 is not that of "
        "its card. Install biper-engine again."
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".png", ".json"])
def test_a_missing_file_is_named(package: Path, suffix: str) -> None:
    file = package.with_suffix(suffix)
    file.unlink()
    with pytest.raises(biper_engine.FileFormatError, match=f"'{file}'.* Install biper-engine aga"):
        READERS.get(suffix, models.pretrained)(NAME)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"latency": 3, "classes": 4}', "\x00"])
@pytest.mark.parametrize("function", [models.card, *READERS.values()])
def test_a_damaged_card_is_named(
    package: Path, function: Callable[[str], object], text: str
) -> None:
    package.with_suffix(".json").write_text(text)
    with pytest.raises(biper_engine.FileFormatError, match=r"resnet20_1w1a.json' is missing or d"):
        function(NAME)


@pytest.mark.parametrize("name", models.shipped())
def test_an_engine_is_whole(name: str) -> None:
    engine, card = models.load(name), models.card(name)
    assert replay(engine.network, backend=None).ok
    assert engine.metadata is not None
    assert engine.metadata.class_names == card.classes
    assert (engine.report.packed, len(engine.report.layers)) == (card.packed, card.layers)


@pytest.mark.parametrize("name", models.shipped())
def test_the_c_library_can_run_an_engine(name: str) -> None:
    assert check_program(FOLDER / f"{name}.biper", program_section) is True


def test_the_digits_are_as_right_as_the_card_says() -> None:
    images, labels = tensors(digits()[1], DIGITS_METADATA)
    with torch.inference_mode():
        found = models.load("digits/resnet20_1w1a")(images).argmax(1)
    card = models.card("digits/resnet20_1w1a")
    assert len(labels) == card.test_images
    assert int((found == labels).sum()) == round(card.accuracy * len(labels))


@pytest.mark.parametrize("function", [models.load, models.card])
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("digit/resnet20", r" Did you mean 'digits/resnet20_1w1a'"),
        ("cifar10/resnet20_1w1a", r" Did you mean .*'digits/resnet20_1w1a'"),
        ("../digits/resnet20_1w1a", r" Did you mean 'digits/resnet20_1w1a'"),
        ("", r"\. There are: .*digits/resnet20_1w1a.* untrained"),
    ],
)
def test_an_unknown_name(function: object, name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"no trained network '{name}' in this package.*{hint}"):
        function(name)  # type: ignore[operator]


def test_the_device_is_passed_on() -> None:
    assert models.load("digits/resnet20_1w1a", device="meta").device == torch.device("meta")
    assert isinstance(models.load("digits/resnet20_1w1a"), biper_engine.Engine)
