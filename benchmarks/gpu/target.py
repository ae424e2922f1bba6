"""The target of measurements: the GPU, or its stand-in in a rehearsal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from time import time
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
SKIPPED = 3  # exit status of a step that has nothing to do here; its last line says why
STAND_IN = "BIPER_GPU_STAND_IN"  # names the module whose `target` stands in for the GPU


class Skipped(Exception):
    """A step has nothing to do here; the message says why."""


class Wrong(Exception):
    """A step found something wrong; the message says what."""


def _graph_ms(call: Callable[[], object]) -> list[float]:
    from triton.testing import do_bench_cudagraph

    found: list[float] = do_bench_cudagraph(call, rep=20, return_mode="all")
    return found


def _graphed(call: Callable[[], object]) -> Callable[[], object]:
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # allocations of the first calls must not be in the graph
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _network(name: str) -> nn.Module:
    from biper_engine.cli.sources import random_network

    return random_network(name)


def _compiled(network: nn.Module) -> Any:
    # The timer makes the graphs, as for all others.
    return torch.compile(network, mode="max-autotune-no-cudagraphs", dynamic=False)


def _install() -> tuple[list[str], dict[str, str]]:
    """Return the command that builds both extensions in the checkout, and its environment.

    They are built only for this GPU. `_cpu` may fail: it is built first, and must not stop `_cuda`.
    """
    major, minor = torch.cuda.get_device_capability()
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-v", "-e", str(ROOT)]
    variables = {"BIPER_CUDA": "1", "BIPER_REQUIRE_NATIVE": "0"}
    variables["BIPER_CUDA_ARCHS"] = os.environ.get("BIPER_CUDA_ARCHS") or f"{major}{minor}"
    return [sys.executable, "-m", "pip", "install", *options], variables


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device and its operations.

    Attributes:
        device, facts: device of all tensors; facts about the device.
        graph_ms: returns samples of the device time of one call, with other calls in a CUDA graph.
        graphed: captures a call in a CUDA graph; returns a call that replays it.
        synchronize: waits for the device.
        network, compiled: creates a network by its name; creates its float rival.
        install, extensions: command and variables of the build; modules, of which the last is
        needed. most_images, most_pixels: limits of the batch size and the sides of maps.
    """

    device: torch.device
    graph_ms: Callable[[Callable[[], object]], list[float]] = _graph_ms
    graphed: Callable[[Callable[[], object]], Callable[[], object]] = _graphed
    synchronize: Callable[[], object] = torch.cuda.synchronize
    network: Callable[[str], nn.Module] = _network
    compiled: Callable[[nn.Module], Any] = _compiled
    install: Callable[[], tuple[list[str], dict[str, str]]] = _install
    extensions: Sequence[str] = ("biper_engine._cpu", "biper_engine._cuda")
    most_images: int = sys.maxsize
    most_pixels: int = sys.maxsize
    facts: dict[str, Any] = field(default_factory=dict)


def target() -> Target:
    """Return the GPU, or its stand-in.

    Raises:
        Skipped: there is no GPU.
    """
    if name := os.environ.get(STAND_IN):
        stand_in: Target = import_module(name).target()
        return stand_in
    if not torch.cuda.is_available():
        kind = "is a build without CUDA" if torch.version.cuda is None else "finds none"
        raise Skipped(f"no GPU: torch {torch.__version__} {kind}")
    properties = torch.cuda.get_device_properties(0)
    facts = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }
    return Target(device=torch.device("cuda"), facts=facts)


def work_folder() -> Path:
    """Return the folder for files that steps share."""
    path = Path(os.environ.get("BIPER_GPU_WORK") or ROOT / "build" / "gpu_check")
    path.mkdir(parents=True, exist_ok=True)
    return path


def step_seconds(otherwise: float) -> float:
    """Return the time left for the running step."""
    end = os.environ.get("BIPER_GPU_STEP_END")  # a time of `time`
    return float(end) - time() if end else otherwise


def output_of(*command: str) -> str:
    """Return the output of a command, or the reason why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return (done.stdout + done.stderr).strip()


def run_step(work: Callable[[Target], str]) -> int:
    """Do a step's work on the target, print its line last, and return its exit status."""
    try:
        with torch.inference_mode():
            print(work(target()))
    except (Skipped, Wrong) as error:
        print(error)
        return SKIPPED if isinstance(error, Skipped) else 1
    return 0
