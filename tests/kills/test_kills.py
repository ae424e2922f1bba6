"""Kills while saving and training: a few of them, and weekly as many as `python -m tests.kills`."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fresh import fresh_run
from tests.kills.__main__ import shares


def test_shares_add_up() -> None:
    assert shares(7, 2) == [4, 3]
    assert shares(1, 2) == [1, 0]


def run(*options: str) -> str:
    program = "import sys; from tests.kills.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = fresh_run(f"import sys; sys.argv[1:] = {options!r}; {program}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_kills_while_saving_lose_nothing(tmp_path: Path, golden_file: Callable[..., Path]) -> None:
    files = [str(golden_file(f"cifar10/{name}")) for name in ("resnet20_1w1a", "resnet18A_1w1a")]
    done = fresh_run(
        "from pathlib import Path; from biper_engine import load; from tests.kills import saves\n"
        f"saves._engines = lambda: [load(path) for path in {files}]\n"
        f"print(saves.kill_saves(3, Path({str(tmp_path)!r}), 0))"
    )
    assert "3 kills while saving: the file was whole each time" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("saves", "trains"),
    [
        pytest.param("4", "1", marks=pytest.mark.deep),
        pytest.param("200", "50", marks=pytest.mark.weekly),
    ],
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_kills_while_saving_and_training_lose_nothing(saves: str, trains: str) -> None:
    said = run("--saves", saves, "--trains", trains)
    assert "kills while saving: the file was whole each time" in said
    assert "every run ended with the bits of one that was not killed" in said
