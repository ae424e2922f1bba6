"""The step `machine`: what is measured on, and why nothing can be where that is so."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from recording import commit

__all__ = ["facts", "keep", "missing", "no_gpu", "output_of", "run_folder"]

PACKAGES = (
    *("torch", "triton", "numpy", "pybind11", "setuptools", "safetensors", "pytest"),
    *("pytest-xdist", "hypothesis", "pillow", "rich", "typer", "matplotlib"),
)
NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,"
    "temperature.gpu,ecc.mode.current",
    "--format=csv",
)


def run_folder() -> Path:
    """Return the folder where steps leave values for those behind them."""
    return Path(os.environ["GPU_RUN"])


def keep(name: str, values: Any) -> None:
    """Write a step's JSON values, at once or not at all: a step may be stopped at any time."""
    path = run_folder() / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=1), encoding="utf-8")
    part.replace(path)


def no_gpu() -> str | None:
    """Return why nothing can be measured here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA GPU; see nvidia-smi in the step machine"
    return None


def missing(*modules: str) -> list[str]:
    """Return those of the modules that are not installed."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def output_of(*command: str) -> str:
    """Return what a command prints, or why it does not."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not there"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not answer in 20 s"
    text = (done.stdout + done.stderr).strip()
    return text if done.returncode == 0 else f"{command[0]} ended with {done.returncode}: {text}"


def facts() -> dict[str, Any]:
    """Return GPU, versions and commit, as JSON values."""
    found: dict[str, Any] = {
        "commit": _commit(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvcc": output_of("nvcc", "--version").splitlines()[-1],
        "nvidia_smi": output_of(*NVIDIA_SMI),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
    }
    if no_gpu() is None:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    return found


def _commit() -> str:
    try:
        return commit()
    except (OSError, subprocess.CalledProcessError):  # no git, or a tree without its history
        return os.environ.get("COMMIT", "unknown: this tree has no git history")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "missing"


def main() -> int:
    found = facts()
    keep("machine", found)
    print(json.dumps(found, indent=1))
    absent = [name for name, number in found["packages"].items() if number == "missing"]
    if absent:
        print(f"Not installed: {', '.join(absent)}; the steps say what they leave out for it.")
    reason = no_gpu()
    if reason is not None:
        print(f"no GPU: {reason}")
        return 1
    print(f"{found['gpu']}, torch {found['torch']}, commit {found['commit']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
