"""Features of all commands: help, version, errors and exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest

import biper_engine
from biper_engine.cli import main

from .conftest import Biper

COMMANDS = (
    "demo",
    "train",
    "report",
    "convert",
    "verify",
    "run",
    "predict",
    "serve",
    "bench",
    "inspect",
    "backends",
)


def test_version(biper: Biper) -> None:
    assert biper("--version").out == f"biper {biper_engine.__version__}\n"


@pytest.mark.some(4)
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns(biper: Biper, command: str) -> None:
    done = biper(*filter(None, [command]), "--help")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.some(4)
@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_on_lines_of_their_own(biper: Biper, command: str) -> None:
    lines = [line.strip() for line in biper(command, "--help").out.splitlines()]
    first = lines[lines.index("Examples") + 1]
    assert first.startswith(f"biper {command}")
    assert "--json" in biper(command, "--help").out


def test_an_error_is_one_message_and_code_1(biper: Biper) -> None:
    done = biper("verify", "nothing.biper")
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("Error: ")
    assert "nothing.biper" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("words", [["--debug", "verify"], ["verify", "--debug"]])
def test_debug_raises(words: list[str]) -> None:
    with pytest.raises(OSError, match=r"nothing\.biper"):
        main([*words, "nothing.biper"])


@pytest.mark.parametrize(
    "words",
    [["bogus"], ["convert"], ["run", "x.biper"], ["train", "--seed", "x"], ["verify", "-z", "f"]],
)
def test_wrong_usage_is_code_2(biper: Biper, words: list[str]) -> None:
    done = biper(*words)
    assert done.code == 2
    assert done.out == ""
    assert "Usage" in done.err


def test_markup_in_a_message_is_shown_as_it_is(biper: Biper) -> None:
    assert "'[red]x.pt'" in biper("convert", "[red]x.pt").err


def test_the_parser_alone_loads_nothing_heavy() -> None:
    program = """
import sys, types
package = types.ModuleType("biper_engine")
package.__path__ = [sys.argv[1]]
sys.modules["biper_engine"] = package  # its __init__ loads torch; the commands must not
import biper_engine.cli
print(sorted({m.partition(".")[0] for m in sys.modules} & {"torch", "matplotlib", "lightning"}))
"""
    path = biper_engine.__path__[0]
    done = subprocess.run(
        [sys.executable, "-c", program, path], check=True, capture_output=True, text=True
    )
    assert done.stdout == "[]\n"
