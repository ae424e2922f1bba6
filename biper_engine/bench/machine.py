"""Describe the machine that a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from biper_engine.ops.backends import backends

__all__ = ["machine_facts"]

_RIVALS = ("onnx", "onnxruntime", "openvino")
# Environment variables that change threads, or the instructions that a contestant may use.
_SETTINGS = (
    *("BIPER_BACKEND", "BIPER_CPU_ISA", "BIPER_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
    *("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"),
)


def machine_facts() -> dict[str, Any]:
    """Return processor, threads, versions and settings of the environment, as JSON values.

    Only rivals that are installed have a version, and only variables that are set are listed.
    """
    facts: dict[str, Any] = {
        "biper_engine": _version("biper-engine"),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "processor": _processor(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: found for name in _RIVALS if (found := _version(name)) != "unknown"},
        "environment": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }
    if any(info.name == "cpu" and info.available for info in backends()):
        from biper_engine.ops.cpu_processor import description

        facts["cpu_backend"] = description()
    return facts


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


def _processor() -> str:
    """Return the processor's name if the system has it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields = [line.partition(":") for line in lines]
    wanted = ("model name", "cpu family", "model")
    found = {name.strip(): value.strip() for name, _, value in fields if name.strip() in wanted}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    family = f", family {found['cpu family']} model {found['model']}" if len(found) == 3 else ""
    return found["model name"] + family
