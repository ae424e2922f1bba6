"""The CUDA backend on a CPU: csrc/cuda compiled over the emulator of tests/native/cuda."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from biper_engine.ops.cuda import CudaBackend, Native
from tests.native import builds


class EmulatedNative(Native):
    """The emulated module, which takes CPU memory."""

    device_type = "cpu"

    def capability(self, device: torch.device) -> int:
        return int(os.environ.get("BIPER_EMULATED_CAPABILITY", "90"))

    def on(self, device: torch.device) -> Any:
        return nullcontext()

    def stream(self, device: torch.device) -> int:
        return 0


def emulated_backend(folder: Path) -> CudaBackend:
    """Return a backend called cuda whose kernels run on the CPU.

    BIPER_EMULATED_MODULE names a build to take; without it one is made in `folder`.
    """
    built = os.environ.get("BIPER_EMULATED_MODULE")
    path = Path(built) if built else builds.emulated_library(folder)
    native = EmulatedNative(builds.import_from(path, builds.EMULATED_NAME))
    return CudaBackend(lambda: (native, None))
