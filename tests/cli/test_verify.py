"""`biper verify`, alone and against the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import biper_engine
from biper_engine import serialization
from biper_engine.serialization import container
from biper_engine.serialization.native_program import SEAL, seal_of

from .conftest import Biper, tiny_network


def test_a_good_file_is_bit_identical(biper: Biper, tiny: Path) -> None:
    done = biper("verify", tiny, "--backend", "reference")
    assert done.code == 0
    assert done.out.startswith("tiny.biper: bit-identical on backend reference: 2 of 2 operators")
    assert "bconv2d" in biper("verify", tiny, "-v").out


def test_json(biper: Biper, tiny: Path) -> None:
    done = biper("verify", tiny, "--json")
    values = json.loads(done.out)
    assert done.code == 0
    assert values["ok"] is values["operators"]["ok"] is values["proof"]["bit_identical"] is True


def test_a_native_program_that_is_not_the_graphs_is_found(
    biper: Biper, tiny: Path, tmp_path: Path
) -> None:
    header, tensors = container.read(tiny)
    steps = header["program"]["steps"]
    sums = next(step["args"] for step in steps if "clamp_max" in step.get("args", {}))
    sums["clamp_max"] = 0.125
    header[SEAL] = seal_of(header, tensors)
    kept = {key: value for key, value in header.items() if key not in ("format", "sha256")}
    container.write(tmp_path / "edited.biper", kept, tensors)
    done = biper("verify", tmp_path / "edited.biper")
    assert done.code == 1
    assert "its native program, for C, is NOT what this version makes of its graph" in done.out
    assert json.loads(biper("verify", tmp_path / "edited.biper", "--json").out)["program"] is False
    assert json.loads(biper("verify", tiny, "--json").out)["program"] is True


def damage(monkeypatch: pytest.MonkeyPatch, name: str, changes: Any) -> None:
    """Change the report that `name` of serialization returns."""
    original = getattr(serialization, name)

    def damaged(*args: Any, **options: Any) -> Any:
        return changes(original(*args, **options))

    monkeypatch.setattr(serialization, name, damaged)


def test_the_first_different_operator_is_named(
    biper: Biper, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(
        monkeypatch,
        "check_backend",
        lambda report: replace(
            report, nodes=tuple(replace(node, different=7) for node in report.nodes)
        ),
    )
    damage(
        monkeypatch,
        "replay",
        lambda report: replace(report, outputs_identical=False, max_output_difference=0.25),
    )
    done = biper("verify", tiny)
    assert done.code == 1
    assert "NOT identical: " in done.out
    assert "differs first, in 7 of " in done.out
    assert "the logits differ by up to 0.25" in done.out


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"outputs_identical": False}, 0, "the outputs are within rounding"),
        ({"outputs_identical": False, "outputs_close": False}, 1, "the outputs are NOT as recor"),
        (
            {"maps_identical": False, "node": "b", "bits_differ": 9, "reference_agrees": False},
            1,
            "NOT as recorded: b differs first, in 9 bits",
        ),
    ],
)
def test_a_proof_that_does_not_repeat(
    biper: Biper,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    code: int,
    message: str,
) -> None:
    damage(monkeypatch, "replay", lambda report: replace(report, **changes))
    done = biper("verify", tiny)
    assert done.code == code
    assert message in done.out


def test_against_the_model(biper: Biper, tiny: Path, photos: Path) -> None:
    words = ("verify", tiny, "--against", "tinynet:with_metadata", "--images", photos)
    done = biper(*words, "--limit", 2)
    assert done.code == 0, done.err
    assert "equal: 1 of 1 binary layers on 2 images" in done.out
    assert "top-1 agreement 100.00%" in done.out
    values = json.loads(biper(*words, "--json").out)
    assert values["images"] == 3
    assert values["layers_equal"] == values["layers"] == 1


def test_against_the_model_without_images(biper: Biper, tiny: Path) -> None:
    done = biper("verify", tiny, "--against", "tinynet:with_metadata")
    assert done.code == 0, done.err
    assert "model: the captured graph gives what the model gives, bit for bit" in done.out
    assert "equal: 1 of 1 binary layers on 8 images" in done.out
    assert "Compared on random inputs; pass --images DIR" in done.out


def test_images_are_not_advised_where_none_can_be_prepared(biper: Biper, tiny: Path) -> None:
    engine = biper_engine.load(tiny)
    engine.metadata = None
    engine.save(tiny)
    done = biper("verify", tiny, "--against", "tinynet:with_metadata")
    assert done.code == 0, done.err
    assert "Compared on random inputs." in done.out


def test_a_network_of_several_inputs(biper: Biper, user_directory: Path) -> None:
    Path("twonet.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Two(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, 8, 3)\n"
        "    def forward(self, a, b):\n"
        "        y = nn.functional.conv2d(a.sign(), 0.1 * self.conv.weight.sign())\n"
        "        return y.mean((2, 3)) + b\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return Two()\n"
    )
    done = biper("convert", "twonet:build", "--input", "1,3,8,8", "--input", "1,8", "-o", "t.biper")
    assert done.code == 0, done.err
    done = biper("verify", "t.biper", "--against", "twonet:build")
    assert done.code == 0, done.err
    assert "equal: 1 of 1 binary layers on 8 images" in done.out


def test_against_another_model(biper: Biper, tiny: Path, photos: Path) -> None:
    state = tiny_network().state_dict()
    torch.save({**state, "2.weight": -state["2.weight"]}, "other.pt")
    words = ("--against", "tinynet:with_metadata", "--weights", "other.pt", "--images", photos)
    done = biper("verify", tiny, *words)
    assert done.code == 1
    assert "not made from this model" in done.out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--against", "tinynet:build", "--limit", "3"], 2, "--limit is for --images"),
        (["--limit", "3"], 2, "are for --against"),
        (["--backend", "referense"], 1, "Did you mean 'reference'?"),
        (["--backend", "cuda"], 1, "cannot run here"),
        (["--against", "tinynet:build", "--images", "empty"], 1, "No image file in 'empty'"),
        (["--against", "tinynet:build", "--images", "gone"], 1, "no image or directory 'gone'"),
    ],
)
def test_errors(biper: Biper, tiny: Path, words: list[str], code: int, message: str) -> None:
    Path("empty").mkdir()
    done = biper("verify", tiny, *words)
    assert done.code == code
    assert message in " ".join(done.err.replace("│", " ").split())


def test_a_truncated_file_is_an_error(biper: Biper, tiny: Path) -> None:
    tiny.write_bytes(tiny.read_bytes()[:-100])
    done = biper("verify", tiny)
    assert done.code == 1
    assert "bytes" in done.err


def test_a_file_without_preprocessing_is_an_error(biper: Biper, tiny: Path, photos: Path) -> None:
    engine = biper_engine.load(tiny)
    engine.metadata = None
    engine.save("bare.biper")
    for words in (["run", "bare.biper", photos], ["verify", "bare.biper", "--images", photos]):
        more = ["--against", "tinynet:build"] if words[0] == "verify" else []
        done = biper(*words, *more)
        assert done.code == 1
        assert "does not say how its images are prepared" in done.err
