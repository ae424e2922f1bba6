"""The workflows call what exists, and build wheels for what the package says it supports."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".github/workflows"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason='pip install "biper-engine[train]"')
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return found


def commands(name: str) -> list[str]:
    jobs = read(name)["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("name", ["tests.yml", "wheels.yml", "docs.yml"])
def test_a_workflow_calls_targets_and_files_that_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands(name):
        assert set(re.findall(r"\bmake ([a-z-]+)", command)) <= targets
        for path in re.findall(r"(?<![\w/])(?:tests|\.ci)/[\w./]+", command):
            assert (ROOT / path).exists(), path


def test_every_supported_python_is_tested_and_gets_wheels() -> None:
    classifiers = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"]]
    versions = [version for version in classifiers if re.fullmatch(r"3\.\d+", version)]
    assert read("tests.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == versions
    tags = [f"cp{version.replace('.', '')}-*" for version in versions]
    assert PROJECT["tool"]["cibuildwheel"]["build"] == tags


def test_the_oldest_supported_torch_is_tested() -> None:
    (wanted,) = [line for line in PROJECT["project"]["dependencies"] if line.startswith("torch>=")]
    versions = read("wheels.yml")["jobs"]["torch"]["strategy"]["matrix"]["torch"]
    assert versions == [f"torch=={wanted.partition('>=')[2]}.*", "torch"]
