"""Kills while saving and training: a few of them; `python -m tests.kills` does many."""

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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_kills_lose_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", "--saves", "8", "--trains", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills while saving: the file was whole each time" in done.stdout
    assert "kills while training" in done.stdout
