"""`biper inspect` and `biper backends`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from biper_engine.ops import backends as module
from biper_engine.ops.backends import _REGISTERED, PREFERENCE
from biper_engine.ops.reference import ReferenceBackend

from .conftest import Biper


def test_a_file_shows_its_layers_and_what_it_carries(biper: Biper, tiny: Path) -> None:
    done = biper("inspect", tiny)
    assert done.code == 0, done.err
    assert "1 of 3 layers packed" in done.out
    assert "distinct" in done.out
    assert "36,864 > 1,152" in done.out
    assert f"file bytes: {tiny.stat().st_size:,}" in done.out
    assert "proof: 1 packed maps and the outputs" in done.out
    assert "format: 0" in done.out
    assert "images: 3x16x16, bilinear, centre crop 1, mean 0, 0, 0, std 1, 1, 1" in done.out
    assert "classes: 4" in done.out
    assert "6 stays float: its input is" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    values = json.loads(biper("inspect", tiny, "--json").out)
    assert values["format"] == 0
    assert values["metadata"]["class_names"] == ["ant", "bee", "[cat]", "dog"]


@pytest.mark.deep
def test_a_known_network_is_inspected_by_name(biper: Biper) -> None:
    done = biper("inspect", "cifar10/resnet20_1w1a")
    assert done.code == 0, done.err
    assert "18 of 20 layers packed" in done.out
    assert "frequency: 20.0" in done.out
    assert "proof" not in done.out
    assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["tinynet:build"], 2, "--input 1,3,224,224"),
        (["cifar10/resnet99"], 1, "Did you mean 'cifar10/resnet"),
        (["missing.pt"], 1, "Cannot read checkpoint 'missing.pt'"),
        (["gone.biper"], 1, "gone.biper"),
    ],
)
def test_errors(
    biper: Biper, user_directory: Path, words: list[str], code: int, message: str
) -> None:
    done = biper("inspect", *words)
    assert done.code == code
    assert done.out == ""
    assert message in " ".join(done.err.replace("│", " ").split())


def test_a_model_is_converted_in_memory(biper: Biper, user_directory: Path) -> None:
    done = biper("inspect", "tinynet:build", "--input", "1,3,16,16", "--json")
    values = json.loads(done.out)
    assert [layer["packed"] for layer in values["report"]["layers"]] == [False, True, False]
    assert values["file_bytes"] is values["proof"] is values["format"] is None
    assert not list(user_directory.glob("*.biper"))


def test_a_file_takes_no_options_of_other_sources(biper: Biper, tiny: Path) -> None:
    done = biper("inspect", tiny, "--input", "1,3,16,16")
    assert done.code == 2
    assert "takes no further options" in " ".join(done.err.split())


def test_every_backend_is_listed_with_its_reason(
    biper: Biper, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing(ReferenceBackend):
        name = "cpu"

        def unavailable_reason(self) -> str:
            return "there was no compiler; install one"

    monkeypatch.setitem(_REGISTERED, "cpu", Missing())
    monkeypatch.delenv("BIPER_BACKEND", raising=False)
    done = biper("backends")
    assert done.code == 0
    assert "there was no compiler; install one" in done.out
    assert "CPU tensors run on: reference" in done.out
    assert "many times slower" in done.out
    values = json.loads(biper("backends", "--json").out)
    assert [row["name"] for row in values["backends"]] == list(PREFERENCE)
    assert values["cpu_tensors_run_on"] == "reference"
    assert values["forced"] is None


def test_cuda_tensors_without_a_device(biper: Biper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIPER_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA tensors run on: nothing. PyTorch finds no CUDA device" in biper("backends").out
    values = json.loads(biper("backends", "--json").out)
    assert values["cuda_tensors_run_on"] is None
    assert values["cuda_reason"] == "PyTorch finds no CUDA device here."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "CUDA tensors run on: reference" in biper("backends").out


def test_a_forced_backend_is_named_also_one_that_cannot_run(
    biper: Biper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIPER_BACKEND", "reference")
    done = biper("backends")
    assert "BIPER_BACKEND forces: reference" in done.out
    assert "CPU tensors run on: reference" in done.out
    monkeypatch.setenv("BIPER_BACKEND", "cuda")
    done = biper("backends")
    assert done.code == 0
    assert "CPU tensors run on: nothing. Backend 'cuda' cannot run here" in done.out


def test_the_instruction_set_and_the_threads_are_named(
    biper: Biper, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not {info.name: info.available for info in module.backends()}["cpu"]:
        pytest.skip("no cpu backend here")
    monkeypatch.setenv("BIPER_NUM_THREADS", "5")
    monkeypatch.delenv("BIPER_BACKEND", raising=False)
    done = biper("backends")
    assert ", 5 threads" in done.out
    assert "CPU tensors run on: cpu" in done.out
