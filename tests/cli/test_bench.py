"""`biper bench`, on a tiny network and tiny budgets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import biper_engine
from biper_engine.bench import Contest, Samples
from biper_engine.cli.bench import _contest_rows
from biper_engine.ops.backends import backends

from .conftest import Biper

QUICK = ("--no-compile", "--seconds", "0")
CPU = {info.name: info.available for info in backends()}["cpu"]


def test_a_model_is_checked_then_timed(biper: Biper, user_directory: Path) -> None:
    done = biper("bench", "tinynet:with_metadata", *QUICK, "-b", "1", "-b", "3")
    assert done.code == 0, done.err
    assert "1 of 1 binary layers equal the float network's" in done.out
    assert "x as fast" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert not list(user_directory.glob("*.biper"))


def test_json_has_every_sample_and_the_machine(biper: Biper, user_directory: Path) -> None:
    done = biper("bench", "tinynet:build", "--input", "1,3,16,16", *QUICK, "-b", "2", "--json")
    values = json.loads(done.out)
    (batch,) = values["batches"]
    assert batch["batch"] == 2
    assert set(batch["contestants"]) == {"float, eager", "engine"}
    assert len(batch["contestants"]["engine"]["samples_ms"]) >= 5
    assert values["machine"]["processor"]
    assert values["profiles"] == []


def test_a_file_is_compared_with_the_model_it_came_from(biper: Biper, tiny: Path) -> None:
    done = biper("bench", tiny, "--against", "tinynet:with_metadata", *QUICK)
    assert done.code == 0, done.err
    assert "1 of 1 binary layers equal" in done.out


def test_a_file_of_unknown_origin_asks_for_its_model(biper: Biper, tiny: Path) -> None:
    done = biper("bench", tiny, *QUICK)
    assert done.code == 2
    assert "--against" in done.err


def test_a_file_of_a_known_network_gets_a_twin(biper: Biper, tmp_path: Path) -> None:
    network = biper_engine.models.build("cifar10/resnet20_1w1a", num_classes=7)
    biper_engine.convert(network, check=False).save(tmp_path / "seven.biper")
    done = biper("bench", tmp_path / "seven.biper", *QUICK, "-b", "1")
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    assert "operators equal the reference" in said
    assert "cifar10/resnet20_1w1a with random weights: the same work, other answers" in said


def test_an_engine_that_differs_is_not_timed(biper: Biper, tiny: Path) -> None:
    done = biper("bench", tiny, "--against", "tinynet:half_binary", *QUICK)
    assert done.code == 1
    assert "Nothing was timed" in done.err
    assert "x as fast" not in done.out


def test_the_profile_has_every_layer(biper: Biper, user_directory: Path) -> None:
    done = biper("bench", "tinynet:with_metadata", *QUICK, "-b", "1", "--profile")
    assert "operator" in done.out
    assert ("GMAC/s a core" in done.out) == CPU
    forced = biper(
        *("bench", "tinynet:with_metadata", *QUICK, "-b", "1", "--profile", "--json"),
        *("--backend", "reference"),
    )
    values = json.loads(forced.out)
    ran = {node["backend"] for node in values["profiles"][0]["nodes"]}
    assert ran == {"torch", "reference"}
    assert values["popcount_peak_macs_per_second_per_core"] is None


def test_threads_that_contradict_the_environment_are_refused(
    biper: Biper, user_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIPER_NUM_THREADS", "3")
    done = biper("bench", "tinynet:with_metadata", *QUICK, "--threads", "2")
    assert done.code == 2
    assert "BIPER_NUM_THREADS=3" in done.err


def test_against_is_for_files(biper: Biper, user_directory: Path) -> None:
    done = biper("bench", "tinynet:with_metadata", "--against", "tinynet:build", *QUICK)
    assert done.code == 2
    assert "--against is for .biper files" in " ".join(done.err.split())


def test_an_unknown_network_is_an_error(biper: Biper, user_directory: Path) -> None:
    done = biper("bench", "cifar10/resnet99", *QUICK)
    assert done.code == 1
    assert "cifar10/resnet99" in done.err


def test_a_rival_without_a_result_has_its_reason_in_the_table() -> None:
    contest = Contest(
        batch=4,
        samples={"float, eager": Samples((8.0,)), "engine": Samples((2.0,))},
        reasons={"float, torch.compile": "no compiler"},
        differences={},
    )
    assert _contest_rows(contest) == [
        ("4", "float, eager", "8.000", "8.000 - 8.000", "500", "4.0x as fast"),
        ("4", "engine", "2.000", "2.000 - 2.000", "2,000", ""),
        ("4", "float, torch.compile", "did not run:", "no compiler", "", ""),
    ]
