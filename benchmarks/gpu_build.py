"""The step `build`: both extensions, compiled in this checkout by the compilers of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import import_module, invalidate_caches
from pathlib import Path
from time import monotonic

from gpu import ROOT
from gpu_machine import keep, missing

EXTENSIONS = ("biper_engine._cpu", "biper_engine._cuda")


def loaded(name: str) -> tuple[int, str]:
    """Return an extension's size in bytes and an empty string, or 0 and why it is not there."""
    try:
        module = import_module(name)
    except ImportError as error:
        return 0, str(error)
    return Path(str(module.__file__)).stat().st_size, ""


def main() -> int:
    start = monotonic()
    absent = missing("pybind11", "setuptools")
    if absent:
        keep("build", {"seconds": 0.0, "status": None, "bytes": {}})
        print(f"not installed: {', '.join(absent)}; nothing can be built")
        return 1
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {"BIPER_REQUIRE_NATIVE": "1", **os.environ}
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    seconds = monotonic() - start
    invalidate_caches()
    found = {name: loaded(name) for name in EXTENSIONS}
    sizes = {name: size for name, (size, _) in found.items()}
    keep("build", {"seconds": seconds, "status": status, "bytes": sizes})
    reasons = [f"{name}: {reason}" for name, (_, reason) in found.items() if reason]
    if shutil.which("nvcc") is None:
        reasons.append("there is no nvcc")
    if status or reasons:
        print(f"setup.py ended with {status}; {'; '.join(reasons) or 'both can be imported'}")
        return 1
    told = ", ".join(
        f"{name.partition('.')[2]} {size / 1e6:.1f} MB" for name, size in sizes.items()
    )
    print(f"{told}, in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
