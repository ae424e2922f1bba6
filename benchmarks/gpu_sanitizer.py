"""The step `sanitizer`: compute-sanitizer over a small set of convolutions and one small network.

python benchmarks/gpu_sanitizer.py          runs the tools
python benchmarks/gpu_sanitizer.py --work   is what they watch: it compares, too
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_budget import Deadline
from gpu_layers import HALVING, STREAM, STREAMED, Case, equal
from gpu_machine import keep, no_gpu, output_of, run_folder
from gpu_roofline import Conv
from gpu_steps import SKIPPED, Group, last_line, python

from biper_engine.geometry import Conv2dGeometry
from biper_engine.ops.backends import by_name

if TYPE_CHECKING:
    from biper_engine.ops.cuda import CudaBackend

TOOLS = ("memcheck", "racecheck", "synccheck")
FILTERS = ("--kernel-name", "--kernel-regex")
NAMESPACE = "biper"  # of all our kernels
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"
BATCH = 3
CPU = torch.device("cpu")
FOUND = 9  # exit status where a tool found something
PLACES = (
    "/usr/local/cuda/bin/compute-sanitizer",
    "/usr/local/cuda/compute-sanitizer/compute-sanitizer",
)


def conv(
    channels: int,
    filters: int,
    size: tuple[int, int],
    *,
    kernel: int = 3,
    what: dict[str, Any] = STREAMED,
    pooled: bool = False,
    **more: Any,
) -> Conv:
    geometry = Conv2dGeometry(
        in_channels=channels,
        out_channels=filters,
        kernel_size=(kernel, kernel),
        padding=(kernel // 2,) * 4,
        **more,
    )
    pool = {"pool": HALVING} if pooled else {}
    return Conv(name="", network="", geometry=geometry, size=size, **what, **pool)


def small_set() -> list[Conv]:
    """Return convolutions whose tiles have ragged edges in every direction."""
    return [
        conv(64, 64, (9, 11)),
        conv(128, 72, (9, 7), stride=(2, 2)),
        conv(256, 128, (8, 8), pooled=True),
        conv(33, 65, (7, 6), dilation=(2, 1)),
        conv(64, 64, (6, 6), groups=4),
        conv(512, 40, (5, 7), kernel=1),
    ]


def tiled_set() -> list[tuple[Conv, int, int]]:
    """Return convolutions, processors for which they take a tile, and the rows of that tile.

    On all processors of a large GPU so little work takes the smallest tile.
    """
    ways = ((1, 128), (2, 64), (4, 32))
    layers = [
        conv(64, 64, (9, 11)),
        conv(64, 64, (9, 11), what={}),
        conv(128, 64, (9, 11), pooled=True),
    ]
    return [(layer, *way) for layer in layers for way in ways]


def on_both(layer: Conv, device: torch.device) -> tuple[Case, tuple[Any, ...]]:
    """Return operands on a device, and the reference's results, of the CPU.

    There no tool slows the reference down, nor does it take the time of what is watched.
    """
    case = Case(layer, BATCH, CPU)
    return case.to(device), case.ours("reference")()


def differs(got: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    return not equal(tuple(None if x is None else x.cpu() for x in got), wanted)


def convolutions(backend: str, device: torch.device) -> list[str]:
    """Run the small set on a backend; return what differs from the reference."""
    wrong = []
    for layer in small_set():
        case, wanted = on_both(layer, device)
        if differs(case.ours(backend)(), wanted):
            wrong.append(f"{layer.geometry} differs from the reference")
    return wrong


def tiles(backend: CudaBackend, device: torch.device) -> list[str]:
    """Run convolutions on every tile; return what takes another, or differs from the reference.

    Tiles are of tensor cores: a device whose products are popcounts has none.
    """
    from biper_engine.ops.cuda import _Conv
    from biper_engine.ops.cuda_layout import bit_limits, plain_signs

    native, wrong = backend._native, []
    with native.on(device):
        properties = native.module.device_properties()
    if not (properties.has_binary_mma or properties.has_byte_mma):
        return []
    for layer, processors, rows in tiled_set():
        case, wanted = on_both(layer, device)
        geometry, epilogue = layer.geometry, plain_signs(case.epilogue)
        limits = None if layer.want_float else bit_limits(case.epilogue, geometry.reduction)
        prepacked = backend.prepack(case.packed, geometry)
        made = _Conv(native, geometry, prepacked, epilogue, limits, processors=processors)
        dtype = STREAM if layer.want_float else None
        operands = (case.bits, case.residual, dtype, layer.want_bits)
        taken = made.way(*operands).rows
        if taken != rows:
            wrong.append(f"{geometry} takes a tile of {taken} rows instead of {rows}")
        if differs(made.fused(*operands), wanted):
            wrong.append(f"{geometry} differs from the reference on a tile of {taken} rows")
    return wrong


def network(backend: str, device: torch.device) -> list[str]:
    """Run a network as it comes, captured and replayed; return what is wrong with its answers.

    Without PyTorch's cache it is called once, and not captured: no memory can be allocated then.
    """
    from gpu_prepare import binary_network

    from biper_engine import convert, use_backend

    engine = convert(binary_network("cifar10/resnet20_1w1a"), check=False).to(device)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    calls = 1 if os.environ.get(UNCACHED) else 3
    with use_backend(backend):
        first, *others = (engine(images) for _ in range(calls))
    same = all(torch.equal(first, other) for other in others)
    return [] if same else ["the network gives another answer when it is called again"]


def sanitizer() -> str | None:
    """Return the tool's path, or None."""
    return shutil.which("compute-sanitizer") or next(
        (place for place in PLACES if Path(place).exists()), None
    )


def only_ours(program: str) -> list[str]:
    """Return options for a tool to leave kernels of others alone; none if its help has no such."""
    for part in re.split(r"\n(?= {0,4}-)", output_of(program, "--help")):
        option = part.split()[0] if part.strip() else ""
        if option in FILTERS and "kernel_substring" in part:
            return [option, f"kernel_substring={NAMESPACE}"]
    return []


def watch(tool: str, program: str, options: list[str], seconds: float) -> str:
    """Run the work under one tool and return what it found, or an empty string."""
    log = run_folder() / f"sanitizer-{tool}.log"
    options = [f"--tool={tool}", f"--error-exitcode={FOUND}", "--print-limit=20", *options]
    # Each tensor an allocation of its own, so that what is past its end is no one's.
    environment = {UNCACHED: "1"} if tool == "memcheck" else {}
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
            backend: Any = by_name("cuda")
            wrong = [*convolutions("cuda", device), *tiles(backend, device)]
            wrong += network("cuda", device)
        print("\n".join(wrong) or "equal to the reference")
        return 1 if wrong else 0
    program = sanitizer()
    if program is None:
        print("compute-sanitizer is not there")
        return SKIPPED
    deadline = Deadline.of_step(75)
    options = only_ours(program)
    print(f"watched: {' '.join(options) or 'all kernels, since its help has no filter'}")
    found = {}
    for number, tool in enumerate(TOOLS):
        found[tool] = watch(tool, program, options, deadline.left_s() / (len(TOOLS) - number))
        keep("sanitizer", found)
    problems = [why for why in found.values() if why]
    print("; ".join(problems) or f"{', '.join(TOOLS)} found nothing")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
