"""The build of examples/aoti."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.native.builds import need_native, shared, succeed

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples/aoti"


def built(temporary: pytest.TempPathFactory) -> Path:
    """Build the example, once for all processes of a test run; return the program."""
    need_native()
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")

    def build(folder: Path) -> Path:
        prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
        options = [prefix, "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1"]
        succeed(cmake, "-S", EXAMPLE, "-B", folder, *options)
        succeed(cmake, "--build", folder, "-j", "2")
        return folder / "biper-aoti"

    return shared(temporary, "aoti_program", build)
