"""The steps `machine`, `build` and `ceilings`: the machine and its peak rates.

python -m gpu.device machine|build|ceilings
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module, invalidate_caches
from pathlib import Path
from time import monotonic

import torch
from recording import commit

from biper_engine.ops.backends import by_name
from gpu.record import append
from gpu.target import ROOT, Target, Wrong, output_of, run_step

NVIDIA_SMI = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
# biper::PeakKind of csrc/cuda/peak.h, and the names of rates in the results.
PEAKS = {"binary_macs": 0, "popcount_macs": 1, "int8_macs": 2, "float_mma_macs": 3, "launches": 4}
PEAK_MS = 40
COPY_BYTES = 2**30
PRODUCT = 8192


def machine(here: Target) -> str:
    facts = {
        **here.facts,
        "commit": checked_out(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "packages": output_of(sys.executable, "-m", "pip", "list", "--format=freeze").split(),
        "nvidia_smi": output_of("nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv"),
    }
    append("machine", **facts)
    return f"{facts['gpu']}, torch {facts['torch']}, commit {facts['commit']}"


def checked_out() -> str:
    try:
        return commit()
    except (OSError, subprocess.CalledProcessError):  # no git, or a tree without its history
        return os.environ.get("COMMIT", "unknown: this tree has no git history")


def build(here: Target) -> str:
    """Build both extensions in the checkout, only for this GPU.

    Raises:
        Wrong: the command failed, or the last one of `here.extensions` cannot be imported.
    """
    start, (command, variables) = monotonic(), here.install()
    environment = {**os.environ, **variables}
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    seconds = monotonic() - start
    invalidate_caches()
    found = {name: loaded(name) for name in here.extensions}
    append("build", seconds=seconds, status=status, variables=variables, found=found)
    told = f"{', '.join(f'{name}: {text}' for name, (_, text) in found.items())}; {seconds:.0f} s"
    if status or not found[here.extensions[-1]][0]:
        raise Wrong(f"the build ended with {status}; {told}")
    return told


def loaded(name: str) -> tuple[int, str]:
    """Return an extension's size in bytes and as text, or 0 and why it is missing."""
    try:
        size = Path(str(import_module(name).__file__)).stat().st_size
    except ImportError as error:
        return 0, str(error).splitlines()[0]
    return size, f"{size / 1e6:.1f} MB"


def rate(here: Target, call: Callable[[], object], amount: float) -> float:
    """Return the rate per second of a call that does `amount`, from its median time."""
    return amount / (1e-3 * statistics.median(here.graph_ms(call)))


def copy_rate(here: Target, nbytes: int) -> float:
    """Return the bytes per second, read and written, of copies between two buffers of `nbytes`."""
    shape = (min(nbytes, 4 * here.most_pixels**2) // 4,)
    source = torch.randint(0, 2**31 - 1, shape, dtype=torch.int32, device=here.device)
    copy = torch.empty_like(source)
    return rate(here, lambda: copy.copy_(source), 2 * source.nbytes)


def product_rate(here: Target, size: int) -> float:
    """Return the MACs per second of a square product of random float16 matrices."""
    size = min(size, here.most_pixels)
    a, b = (torch.randn(size, size, device=here.device).half() for _ in range(2))
    out = torch.empty_like(a)
    return rate(here, lambda: torch.mm(a, b, out=out), float(size) ** 3)


def ceilings(here: Target) -> str:
    copy = copy_rate(here, COPY_BYTES)
    append("ceiling", name="copy_bytes", rate=copy)
    # Both buffers fit in a quarter of L2: it has two halves, and data may be in both.
    append("ceiling", name="l2_copy_bytes", rate=copy_rate(here, here.facts["l2_bytes"] // 8))
    append("ceiling", name="float_macs", rate=product_rate(here, PRODUCT))
    module, absent = by_name("cuda")._native.module, []  # type: ignore[attr-defined]
    for name, kind in PEAKS.items():
        try:
            append("ceiling", name=name, rate=module.measure_peak(kind, PEAK_MS))
        except RuntimeError as error:  # the device has no such unit
            append("ceiling", name=name, reason=str(error))
            absent.append(name)
    return f"copy {copy * 1e-12:.2f} TB/s; not measured: {', '.join(absent) or 'nothing'}"


if __name__ == "__main__":
    steps = {"machine": machine, "build": build, "ceilings": ceilings}
    sys.exit(run_step(steps[sys.argv[1]]))
