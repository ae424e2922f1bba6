"""Stands in for a GPU in a rehearsal of benchmarks/gpu: an emulator, small networks, fake tools.

    bash benchmarks/gpu_check.sh --rehearse

`csrc/cuda` runs on the emulator of tests/native/cuda, Triton's kernels in its interpreter, and CUDA
graphs on the driver of tests/runtime.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from sysconfig import get_config_var
from time import perf_counter
from typing import Any

import torch
from gpu.processes import python
from gpu.target import Target, work_folder
from torch import Tensor, nn

from biper_engine.nn import BinaryConv2d
from biper_engine.ops import backends
from biper_engine.ops.cuda import CudaBackend
from biper_engine.runtime import plan
from tests.emulated_cuda import EmulatedNative
from tests.native import builds
from tests.runtime.fake_driver import FakeDriver

TOOL = """#!{python}
import subprocess, sys

COUNTED = '"ID","Kernel Name","gpu__time_duration.sum"\\n"","","us"\\n'
words = sys.argv[1:]
if words == ["--help"]:
    sys.exit(print("  --kernel-name arg\\n    kernel_substring"))
if "--log-file" in words:
    with open(words[words.index("--log-file") + 1], "w") as log:
        log.write("==PROF== on an emulator\\n" + COUNTED)
        log.writelines(f'"{{i}}","bconv_mma","{{i + 1}},000.5"\\n' for i in range(2))
sys.exit(subprocess.call(words[words.index({python!r}):]))
"""


class Small(nn.Module):
    input_shape = (3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.conv = BinaryConv2d(32, 32, 3, padding=1, frequency=20.0, stage=2)
        self.norm = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Any:
        x = nn.functional.hardtanh(self.stem(x))
        x = nn.functional.hardtanh(self.norm(self.conv(x)) + x)
        return self.fc(x.mean((2, 3)))


def small(_name: str) -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def wall_ms(call: Callable[[], object]) -> list[float]:
    start = perf_counter()
    call()
    return [1e3 * (perf_counter() - start)]


def on_cpu(**more: Any) -> Target:
    """Return a target whose work is done when a call returns."""
    return Target(
        device=torch.device("cpu"),
        graph_ms=wall_ms,
        graphed=lambda call: call,
        synchronize=lambda: None,
        network=small,
        compiled=lambda network: torch.compile(network, backend="eager"),
        most_images=2,
        most_pixels=6,
        facts={"gpu": "an emulator", "l2_bytes": 2**20},
        **more,
    )


def emulated_module() -> Path:
    """Return where the emulated module is, or will be."""
    named = os.environ.get("BIPER_EMULATED_MODULE")
    name = f"{builds.EMULATED_NAME}{get_config_var('EXT_SUFFIX')}"
    return Path(named) if named else work_folder() / "emulated" / name


def environment() -> dict[str, str]:
    """Return the variables of a rehearsal; its tools come first on the path."""
    folder = work_folder() / "tools"
    folder.mkdir(exist_ok=True)
    for name in ("nvcc", "ncu", "compute-sanitizer"):
        (folder / name).write_text(TOOL.format(python=sys.executable), encoding="utf-8")
        (folder / name).chmod(0o755)
    return {
        "BIPER_GPU_STAND_IN": "tests.benchmarks.gpu_stand_in",
        "BIPER_EMULATED_MODULE": str(emulated_module()),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "TRITON_INTERPRET": "1",
    }


def target() -> Target:
    """Return the stand-in, with the backend cuda on the emulator where that is built."""
    path = emulated_module()
    sys.path.append(str(path.parent))
    if path.exists():
        native = EmulatedNative(import_module(builds.EMULATED_NAME))
        backends._REGISTERED["cuda"] = CudaBackend(lambda: (native, None))
    driver = FakeDriver()
    vars(plan)["graph_driver"] = lambda device: driver
    return on_cpu(
        install=lambda: (python("tests.benchmarks.gpu_stand_in"), {}),
        extensions=("biper_engine._cpu", builds.EMULATED_NAME),
    )


if __name__ == "__main__" and not emulated_module().exists():
    emulated_module().parent.mkdir(exist_ok=True)
    builds.emulated_library(emulated_module().parent)
