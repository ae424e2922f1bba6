"""`biper convert`, from every kind of source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import biper_engine
from biper_engine import models

from .conftest import Biper, tiny_network

TINY = ("tinynet:build", "--input", "1,3,16,16")


def test_a_callable_ends_with_one_line(biper: Biper, user_directory: Path) -> None:
    done = biper("convert", *TINY)
    assert done.code == 0
    assert done.err == ""
    (line,) = done.out.splitlines()
    size = Path("build.biper").stat().st_size
    assert line.startswith("packed 1/3 layers, ")
    assert f"-> {size:,} bytes, 1/1 layers equal; end to end no bit differs; largest " in line
    assert line.endswith("; next: biper verify build.biper")


def test_verbose_prints_every_layer_with_its_reason(biper: Biper, user_directory: Path) -> None:
    done = biper("convert", *TINY, "-v", "-o", "out dir.biper", "--no-check")
    assert "why float" in done.out
    assert "distinct values" in done.out
    assert max(map(len, done.out.splitlines()[:-1])) <= 80
    assert done.out.splitlines()[-1].endswith("next: biper verify 'out dir.biper'")
    assert "not compared with the model" in done.out


def test_json_is_all_of_stdout(biper: Biper, user_directory: Path) -> None:
    done = biper("convert", *TINY, "--json")
    values = json.loads(done.out)
    assert values["packed"] == 1
    assert values["layers"] == len(values["report"]["layers"]) == 3
    assert values["verify"]["ok"] is True
    assert values["file_bytes"] == Path(values["file"]).stat().st_size
    assert values["next"] == "biper verify build.biper"
    assert "packed 1/3" in done.err


def test_a_checkpoint_of_ours(biper: Biper, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = models.build("cifar10/resnet20_1w1a", frequency=10.0)
    models.save_checkpoint(tmp_path / "stage2.pt", network)
    done = biper("convert", tmp_path / "stage2.pt", "--no-check")
    assert done.code == 0, done.err
    assert "packed 18/" in done.out
    assert biper_engine.load(tmp_path / "stage2.biper").provenance == network.provenance


def test_a_checkpoint_that_is_silent_says_what_to_pass(biper: Biper, tmp_path: Path) -> None:
    path = tmp_path / "model_best.pth.tar"
    network = models.build("cifar10/resnet20_1w1a")
    torch.save({"state_dict": network.state_dict(), "model": "resnet20_1w1a"}, path)
    assert "does not say its stage" in biper("convert", path).err
    assert "does not say its frequency" in biper("convert", path, "--stage", 2).err
    done = biper("convert", path, "--frequency", 20, "--stage", 1)
    assert done.code == 1
    assert "stage-1 network" in done.err
    assert not list(tmp_path.glob("*.biper"))


def test_a_file_of_code_may_be_anywhere(biper: Biper, user_directory: Path) -> None:
    folder = Path("code here")
    folder.mkdir()
    Path("tinynet.py").rename(folder / "inner.py")
    (folder / "mynet.py").write_text("from inner import build\n")
    torch.save(tiny_network().state_dict(), "weights.pt")
    source = f"{folder / 'mynet.py'}:build"
    done = biper("convert", source, "--weights", "weights.pt", *TINY[1:], "--no-check")
    assert done.code == 0, done.err
    (folder / "__init__.py").touch()
    (folder / "relative.py").write_text("from .inner import build\n")
    done = biper("convert", f"{folder / 'relative.py'}:build", *TINY[1:])
    assert done.code == 1
    assert "imports from its own package" in done.err


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_are_loaded(biper: Biper, user_directory: Path, suffix: str) -> None:
    state = tiny_network().state_dict()
    state["6.bias"] += 100.0
    path = Path(f"weights{suffix}")
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    assert biper("convert", *TINY, "--weights", path, "--no-check").code == 0
    assert float(biper_engine.load("build.biper")(torch.zeros(1, 3, 16, 16)).min()) > 50


def test_weights_that_do_not_fit_are_named(biper: Biper, user_directory: Path) -> None:
    torch.save({"other": torch.zeros(1)}, "weights.pt")
    done = biper("convert", *TINY, "--weights", "weights.pt")
    assert done.code == 1
    assert "does not fit Sequential" in done.err
    assert "other" in done.err


def test_weights_are_never_unpickled(biper: Biper, user_directory: Path) -> None:
    torch.save({"x": Path("y")}, "weights.pt")
    done = biper("convert", *TINY, "--weights", "weights.pt")
    assert done.code == 1
    assert "not unpickled, because that can run any code" in done.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["tinynet:build"], 2, "--input 1,3,224,224"),
        (["tinynet:build", "--input", "3x4"], 2, "sizes separated by commas"),
        (["tinynet:build", "--stage", "2", "--input", "1,3,16,16"], 2, "are for checkpoints"),
        (["tinynet.py", "--weights", "w.pt"], 2, "--weights is for"),
        (["tinynet:missing"], 1, "has no 'missing'"),
        (["tinynet:number"], 1, "is a int, wanted a callable"),
        (["tinynet:no_module"], 1, "returned a int"),
        (["tinynet:needs_argument"], 1, "cannot be called without arguments"),
        (["nowhere_to_be_found:build"], 1, "No module 'nowhere_to_be_found'"),
        (["tinynet.py"], 1, "as in tinynet.py:build"),
        (["tinynet.py:missing"], 1, "file tinynet.py has no 'missing'"),
        (["tinynet.py:needs_argument"], 1, "pass a checkpoint of it by --weights"),
        (["no/where.py:build"], 1, "There is no file 'no/where.py'"),
        (["missing.pt"], 1, "Cannot read checkpoint 'missing.pt'"),
        (["already.biper"], 1, "biper verify already.biper"),
        (["tinynet:half_binary"], 1, "No binary layer"),
        (["tinynet:with_metadata", "-o", "no/where.biper", "--no-check"], 1, "no directory 'no'"),
    ],
)
def test_errors(
    biper: Biper, user_directory: Path, words: list[str], code: int, message: str
) -> None:
    done = biper("convert", *words)
    assert done.code == code
    assert done.out == ""
    assert message in " ".join(done.err.replace("│", " ").split())


def test_a_binary_layer_left_in_float_gives_a_warning(biper: Biper, user_directory: Path) -> None:
    done = biper("convert", "tinynet:one_binary", "--no-check")
    assert done.code == 0
    assert done.err.startswith("Warning: 1 binary layer(s) stay in floating point. 5 (")
    assert biper("convert", "tinynet:one_binary", "--unconverted", "raise").code == 1


def test_weights_of_0_are_packed_and_counted(biper: Biper, user_directory: Path) -> None:
    done = biper("convert", "tinynet:with_zero", "--no-check", "-v")
    assert done.err == ""
    assert "packed 2/4" in done.out
    assert "1 weight is 0" in done.out
