"""Compile csrc/cuda for the deep tests, which take over the objects that are current."""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCH = "90"


def main() -> None:
    """Compile with what setup.py does, if it could, into the folder of `tests.native.builds`."""
    os.environ.update(BIPER_CUDA_ARCHS=ARCH, MAX_JOBS="1")
    os.environ.pop("NVCCFLAGS", None)
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_without_setup")
    if reason := setup["cuda_obstacle"]():
        sys.exit(reason)
    folder = ROOT / "build" / f"sm_{ARCH}"
    files = ROOT / "csrc" / "cuda"
    sources = [*sorted(files.glob("*.cu")), *sorted(files.glob("*.cpp"))]
    setup["build"](sources, folder / "objects", folder / "module.so")


if __name__ == "__main__":
    main()
