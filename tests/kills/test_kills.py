"""A few kills while saving and training; `python -m tests.kills` does many."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kills.__main__ import shares

ROOT = Path(__file__).resolve().parent.parent.parent


def test_shares_add_up() -> None:
    assert shares(7, 2) == [4, 3]
    assert shares(1, 2) == [1, 0]


def run(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_kills_while_saving_lose_nothing(tmp_path: Path) -> None:
    said = run("--saves", "6", "--trains", "0", "--folders", str(tmp_path))
    assert "6 kills while saving: the file was whole each time" in said


@pytest.mark.deep
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_kills_while_saving_and_training_lose_nothing() -> None:
    said = run("--saves", "20", "--trains", "4")
    assert "kills while saving: the file was whole each time" in said
    assert "every run ended with the bits of one that was not killed" in said
