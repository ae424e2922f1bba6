"""The CUDA backend on a CPU: csrc/cuda compiled with the emulator of tests/native/cuda."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from biper_engine.ops.cuda import CudaBackend, Native
from tests.native import builds


class EmulatedNative(Native):
    """The emulated module, which takes CPU memory."""

    device_type = "cpu"

    def refusal(self, device: torch.device) -> str | None:
        return None

    def on(self, device: torch.device) -> Any:
        return nullcontext()

    def stream(self, device: torch.device) -> int:
        return 0


def emulated_backend(temporary: pytest.TempPathFactory) -> CudaBackend:
    """Return a backend called cuda whose kernels run on the CPU.

    BIPER_EMULATED_MODULE names a build to take; without it one is made, for all test processes.
    """
    built = os.environ.get("BIPER_EMULATED_MODULE")
    if built is None:
        path = builds.shared(temporary, "emulated_cuda", builds.emulated_library)
    else:
        path = Path(built)
    native = EmulatedNative(builds.import_from(path, builds.EMULATED_NAME))
    return CudaBackend(lambda: (native, None))
