"""The CUDA backend on a CPU: csrc/cuda compiled over the emulator of tests/native/cuda."""

import importlib.util
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from biper_engine.ops.cuda import CudaBackend, Native


class EmulatedNative(Native):
    """The emulated module, which takes CPU memory."""

    device_type = "cpu"

    def capability(self, device: torch.device) -> int:
        return int(os.environ.get("BIPER_EMULATED_CAPABILITY", "90"))

    def on(self, device: torch.device) -> Any:
        return nullcontext()

    def stream(self, device: torch.device) -> int:
        return 0


def load_module(path: Path) -> ModuleType:
    """Import the emulated module from a file."""
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def emulated_backend() -> CudaBackend:
    """Return a backend called cuda whose kernels run on the CPU."""
    native = EmulatedNative(load_module(Path(os.environ["BIPER_EMULATED_MODULE"])))
    return CudaBackend(lambda: (native, None))
