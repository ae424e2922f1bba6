"""The steps `layers` and `counters`: binary convolutions on their own.

    python -m gpu.layers times       compared with cuDNN's convolution in float16
    python -m gpu.layers counters    two of them under ncu
    python -m gpu.layers once        the run that ncu profiles

The layers are those of a ResNet-18. Ours computes everything that the network computes there:
scale, residual, clamp, float16 map and bits. cuDNN computes only the product.

A kernel must read each of its inputs and its weights once, write each of its outputs once, and
do its multiply-accumulates, including padded taps. The longer of the two times is its floor.
Parameters of a channel, at most 20 bytes, are not counted.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from biper_engine import ops
from biper_engine.bench import RESNET18_LAYERS, ConvShape
from biper_engine.bits import words
from biper_engine.errors import BackendUnavailableError
from biper_engine.ops.backends import by_name, use_backend
from gpu.processes import find_tool, python
from gpu.record import append
from gpu.target import Skipped, Target, Wrong, run_step, work_folder

STREAM = torch.float16


RESNET = sorted(RESNET18_LAYERS, key=lambda one: one.stride)
CASES = [(layer, batch) for batch in (256, 1) for layer in RESNET]  # the most important first
WATCHED = (RESNET[0], RESNET[2])
# In addition to `--set detailed`: where warps wait, and for which instructions.
NCU = (
    *("--set", "detailed", "--section", "SchedulerStats", "--section", "WarpStateStats"),
    *("--section", "InstructionStats", "--clock-control", "none", "--csv", "--page", "raw"),
    *("--kernel-name-base", "mangled", "--kernel-name", "regex:biper.*bconv"),
)
_KERNEL, _NUMBER = "Kernel Name", re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?$")


def work_of(layer: ConvShape, batch: int) -> dict[str, int]:
    """Return the bytes and multiply-accumulates of a layer with its float16 maps and bits."""
    geometry, (rows, columns) = layer.geometry, layer.geometry.output_size(layer.size, layer.size)
    bits_in = 4 * layer.size**2 * words(layer.in_channels)
    out = rows * columns * (4 * words(layer.out_channels) + 2 * 2 * layer.out_channels)
    weights = 4 * layer.out_channels * geometry.taps * words(layer.in_channels)
    return {"bytes": batch * (bits_in + out) + weights, "macs": batch * layer.macs}


def floor_s(work: Mapping[str, int], ceilings: Mapping[str, float]) -> tuple[float, str] | None:
    """Return the least seconds for some work and its bound; None if no rate is known.

    Args:
        work: from `work_of`.
        ceilings: rates per second: `copy_bytes`, those of L2, MACs of units; some may be missing.
    """
    fits = work["bytes"] <= ceilings.get("l2_bytes", 0) / 2
    rates = {
        "bytes": ceilings.get("l2_copy_bytes" if fits else "copy_bytes"),
        "macs": ceilings.get("binary_macs") or ceilings.get("int8_macs"),
    }
    times = {name: work[name] / rate for name, rate in rates.items() if rate}
    return max((seconds, name) for name, seconds in times.items()) if times else None


class Case:
    """Operands of one layer at one batch size, from a fixed seed, made without our kernels."""

    def __init__(self, layer: ConvShape, batch: int, device: torch.device) -> None:
        self.layer, self.device = layer, device
        generator = torch.Generator(device).manual_seed(0)
        geometry, channels = layer.geometry, layer.out_channels

        def signs(*shape: int) -> Tensor:
            bits = torch.randint(0, 2, shape, generator=generator, device=device)
            return (bits * 2 - 1).to(STREAM).contiguous(memory_format=torch.channels_last)

        def uniform() -> Tensor:
            return torch.rand(channels, generator=generator, device=device)

        self.signs = signs(batch, layer.in_channels, layer.size, layer.size)
        self.weight = signs(channels, layer.in_channels, 3, 3)
        with use_backend("reference"):
            self.bits, self.packed = ops.binarize(self.signs), ops.binarize(self.weight)
        self.epilogue = ops.Epilogue(
            multiplier=(uniform() - 0.25) * (4 / geometry.reduction**0.5),
            bias=uniform() - 0.5,
            clamp_min=-1.0,
            clamp_max=1.0,
            threshold=(uniform() - 0.5) / 4,
            sense=uniform() < 0.5,
        )
        shape = (batch, channels, *geometry.output_size(layer.size, layer.size))
        residual = torch.randn(shape, generator=generator, device=device).to(STREAM)
        self.residual = residual.contiguous(memory_format=torch.channels_last)

    def ours(self, backend: str) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """Return the whole layer on a backend.

        Raises:
            BackendUnavailableError: the backend cannot run the layer.
        """
        geometry, found = self.layer.geometry, by_name(backend)
        if reason := found.unsupported_reason("bconv2d_float_bits", geometry, self.device):
            raise BackendUnavailableError(reason)
        prepacked = ops.prepack(self.packed, geometry, backend)
        run = found.bind_fused(geometry, self.epilogue, prepacked, STREAM, True)
        return partial(run, self.bits, self.residual)

    def float16(self) -> Callable[[], Tensor]:
        """Return cuDNN's convolution without an epilogue."""
        return partial(F.conv2d, self.signs, self.weight, None, self.layer.stride, 1)


def equal(got: tuple[Tensor | None, ...], wanted: tuple[Tensor | None, ...]) -> bool:
    """Return whether maps have the same shapes, dtypes and bytes."""
    return all(
        a is b
        or (
            (a is not None and b is not None and a.dtype == b.dtype)
            and torch.equal(a.view(torch.int16), b.view(torch.int16))
        )
        for a, b in zip(got, wanted, strict=True)
    )


def case(layer: ConvShape, batch: int, here: Target) -> Case:
    """Return operands no larger than the target's limits."""
    cut = replace(layer, size=min(layer.size, here.most_pixels))
    return Case(cut, min(batch, here.most_images), here.device)


# -- times ----------------------------------------------------------------------------------------


def measure(layer: ConvShape, batch: int, here: Target, *backends: str) -> list[str]:
    """Check ours against the reference, then time all on one layer; return the wrong ones."""
    operands, wrong = case(layer, batch, here), []
    wanted = operands.ours("reference")()
    where = {"layer": layer.name, "batch": batch}
    work = work_of(operands.layer, len(operands.bits))
    for name in (*backends, "float16"):
        try:
            rival = name == "float16"
            call: Callable[[], Any] = operands.float16() if rival else operands.ours(name)
            if not rival and not equal(call(), wanted):
                wrong.append(f"{name} differs from the reference on {layer.name}, batch {batch}")
                append("refused", **where, who=name, reason=wrong[-1])
                continue
            append("layer", **where, who=name, work=work, ms=here.graph_ms(call))
        except (BackendUnavailableError, RuntimeError) as error:
            append("refused", **where, who=name, reason=str(error).strip().splitlines()[0])
    return wrong


def times(here: Target) -> str:
    found = [measure(layer, batch, here, "cuda", "triton") for layer, batch in CASES]
    if wrong := [text for each in found for text in each]:
        raise Wrong("; ".join(wrong))
    return f"{len(found)} layers measured, all equal to the reference"


# -- counters -------------------------------------------------------------------------------------


def once(here: Target) -> str:
    for layer in WATCHED:
        case(layer, 256, here).ours("cuda")()
    here.synchronize()
    return f"ran {', '.join(layer.name for layer in WATCHED)}"


def counted(text: str) -> list[dict[str, Any]]:
    """Read the output of `ncu --csv --page raw`: every number, by its metric's name."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if f'"{_KERNEL}"' in line), len(lines))
    rows = [row for row in csv.DictReader(lines[first:]) if row[_KERNEL]]  # units have no kernel
    texts = [{name: (text or "").replace(",", "") for name, text in row.items()} for row in rows]
    return [
        {
            "kernel": row[_KERNEL],
            "counters": {name: float(text) for name, text in row.items() if _NUMBER.match(text)},
        }
        for row in texts
    ]


def counters(_here: Target) -> str:
    program, log = find_tool("ncu"), work_folder() / "ncu.csv"
    if program is None:
        raise Skipped("ncu was not found")
    log.unlink(missing_ok=True)
    command = [program, *NCU, "--log-file", str(log), *python("gpu.layers", "once")]
    status = subprocess.run(command, check=False).returncode
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = counted(text)
    for layer, one in zip(WATCHED, found, strict=False):
        append("counters", layer=layer.name, **one)
    if status or len(found) != len(WATCHED):
        print(text[-4000:])
        raise Wrong(f"ncu ended with {status} and counted {len(found)} of {len(WATCHED)} kernels")
    return f"counted {len(found)} kernels"


if __name__ == "__main__":
    sys.exit(run_step({"times": times, "counters": counters, "once": once}[sys.argv[1]]))
