"""The step `sanitizer`: compute-sanitizer over a small set of convolutions and one small network.

python benchmarks/gpu_sanitizer.py          runs the tools
python benchmarks/gpu_sanitizer.py --work   is what they watch: it compares, too
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_budget import Deadline
from gpu_machine import keep, no_gpu, run_folder
from gpu_steps import SKIPPED, Group, last_line, python

from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 9  # exit status where a tool found something
PLACES = (
    "/usr/local/cuda/bin/compute-sanitizer",
    "/usr/local/cuda/compute-sanitizer/compute-sanitizer",
)


def small_set() -> list[tuple[Conv2dGeometry, tuple[int, int], Pool2dGeometry]]:
    """Return convolutions whose tiles have ragged edges in every direction."""

    def square(channels: int, filters: int, kernel: int, **more: Any) -> Conv2dGeometry:
        return Conv2dGeometry(
            in_channels=channels,
            out_channels=filters,
            kernel_size=(kernel, kernel),
            padding=(kernel // 2,) * 4,
            **more,
        )

    none, halving = Pool2dGeometry(), Pool2dGeometry(kernel_size=(2, 2), stride=(2, 2))
    return [
        (square(64, 64, 3), (9, 11), none),
        (square(128, 72, 3, stride=(2, 2)), (9, 7), none),
        (square(256, 128, 3), (8, 8), halving),
        (square(33, 65, 3, dilation=(2, 1)), (7, 6), none),
        (square(64, 64, 3, groups=4), (6, 6), none),
        (square(512, 40, 1), (5, 7), none),
    ]


def convolutions(backend: str, device: torch.device) -> list[str]:
    """Run the small set on a backend; return what differs from the reference."""
    from gpu_layers import Case, equal
    from gpu_roofline import Conv

    wrong = []
    for geometry, size, pool in small_set():
        layer = Conv(
            name="",
            network="",
            geometry=geometry,
            size=size,
            residual=True,
            want_float=True,
            pool=pool,
        )
        case = Case(layer, 3, device)
        if not equal(case.ours(backend)(), case.ours("reference")()):
            wrong.append(f"{geometry} differs from the reference")
    return wrong


def network(backend: str, device: torch.device) -> list[str]:
    """Run a network as it comes, captured and replayed; return what is wrong with its answers."""
    from gpu_prepare import binary_network

    from biper_engine import convert, use_backend

    engine = convert(binary_network("cifar10/resnet20_1w1a"), check=False).to(device)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    with use_backend(backend):
        first, *others = (engine(images) for _ in range(3))
    same = all(torch.equal(first, other) for other in others)
    return [] if same else ["the network gives another answer when it is called again"]


def sanitizer() -> str | None:
    """Return the tool's path, or None."""
    return shutil.which("compute-sanitizer") or next(
        (place for place in PLACES if Path(place).exists()), None
    )


def watch(tool: str, program: str, seconds: float) -> str:
    """Run the work under one tool and return what it found, or an empty string."""
    log = run_folder() / f"sanitizer-{tool}.log"
    options = [f"--tool={tool}", f"--error-exitcode={FOUND}", "--print-limit=20"]
    # Each tensor an allocation of its own, so that what is past its end is no one's.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    command = [program, *options, *python(os.path.abspath(__file__), "--work")]
    group = Group(command, log, environment)
    try:
        status = group.wait(seconds)
    finally:
        group.stop()
    print(f"----- {tool}")
    print(log.read_text(encoding="utf-8", errors="replace").rstrip()[-20000:])
    if status is None:
        return f"{tool} stopped after {seconds:.0f} s"
    return "" if status == 0 else f"{tool}: {last_line(log)}"


def main(words: list[str]) -> int:
    reason = no_gpu()
    if reason is not None:
        print(f"no GPU: {reason}")
        return 1
    if words:
        with torch.inference_mode():
            device = torch.device("cuda")
            wrong = [*convolutions("cuda", device), *network("cuda", device)]
        print("\n".join(wrong) or "equal to the reference")
        return 1 if wrong else 0
    program = sanitizer()
    if program is None:
        print("compute-sanitizer is not there")
        return SKIPPED
    deadline = Deadline.of_step(75)
    found = {}
    for number, tool in enumerate(TOOLS):
        found[tool] = watch(tool, program, deadline.left_s() / (len(TOOLS) - number))
        keep("sanitizer", found)
    problems = [why for why in found.values() if why]
    print("; ".join(problems) or f"{', '.join(TOOLS)} found nothing")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
