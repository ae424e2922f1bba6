"""The operator matrix on csrc/cuda in the emulator, under the address sanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native import builds

pytestmark = pytest.mark.weekly

SUITES = ("bconv2d", "epilogue", "binarize", "bmaxpool2d", "stem", "cuda")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Build the emulated module with sanitizers; return what a process needs to load it."""
    path = builds.emulated_library(tmp_path_factory.mktemp("sanitized_cuda"), sanitize=True)
    return {**builds.sanitizer_environment(), "BIPER_EMULATED_MODULE": str(path)}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:xdist"]
    own = {k: v for k, v in os.environ.items() if k.startswith("PYTEST_")}
    clean = {k: v for k, v in environment.items() if k not in own}
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", "-m", "not weekly", *arguments],
        cwd=builds.ROOT,
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_operator_matrix_touches_no_memory_of_others(environment: dict[str, str]) -> None:
    files = [str(Path("tests/ops", f"test_{suite}.py")) for suite in SUITES]
    done = run(environment, "-k", "emulated and not 120 and not 75", *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
