"""The step `prepare`: convert the networks, make their rivals, and compile some while nvcc runs.

Nothing here is timed. Each network is converted in a process of its own; what comes out is pickled
for the steps behind this one. Then `torch.compile` fills its caches, the most important rival
first, until the extension is built: what is cached need not be tuned again when it is timed.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_budget import Deadline, Job, do
from gpu_machine import missing, no_gpu, run_folder
from gpu_steps import Group, last_line, python
from gpu_traffic import Kernel, kernels
from torch import Tensor, fx, nn

from biper_engine import Engine, convert

__all__ = [
    "NETWORKS",
    "STREAMS",
    "Prepared",
    "accepted",
    "file_of",
    "load",
    "prepare",
    "rivals_by_importance",
]

BINARY = (
    *("imagenet/resnet18_1w1a", "cifar10/vgg_small_1w1a", "cifar10/resnet18_1w1a"),
    *("imagenet/resnet34_1w1a", "imagenet/mobilenet_1w1a", "cifar10/resnet20_1w1a"),
)
FLOAT = ("mobilenet_v3_small", "mobilenet_v3_large")
NETWORKS = (*BINARY, *FLOAT)
STREAMS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BATCHES = (256, 1, 64, 8, 1024)
COMPILE_S = 110.0
COMPILED_S = 25.0
CONVERT_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A network, ready to be timed.

    Attributes:
        name: of it.
        input_shape: of one image.
        engines: by stream; none of a float network.
        twin: the float network that does the same work, float32, takes images, returns a tuple.
        kernels: what the engine of float16 has to do.
    """

    name: str
    input_shape: tuple[int, ...]
    engines: dict[str, Engine]
    twin: fx.GraphModule
    kernels: list[Kernel]


def binary_network(name: str) -> nn.Module:
    """Return a network of the registry as if it were trained."""
    from biper_engine.cli.sources import random_network

    return random_network(name)


def float_network(name: str) -> nn.Module:
    """Return a MobileNetV3 with random weights and the statistics that they give."""
    import mobilenet_v3
    from frontier import as_if_trained

    return as_if_trained(getattr(mobilenet_v3, name))


def prepare(name: str, build: Callable[[str], nn.Module] | None = None) -> Prepared:
    """Convert a network in every stream, and make its float twin.

    Args:
        name: one of `NETWORKS`.
        build: makes it; None takes it from the registry.
    """
    from biper_engine.conversion.twin import float_twin, folded_network

    model = (build or (binary_network if name in BINARY else float_network))(name)
    shape = tuple(model.input_shape)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    if name in FLOAT:
        folded = folded_network(model, images)
        return Prepared(name=name, input_shape=shape, engines={}, twin=folded, kernels=[])
    # What conversion does is for tests to check; here `gpu_contest` compares devices.
    engines = {
        stream: convert(model, images, compute_dtype=dtype, check=False)
        for stream, dtype in STREAMS.items()
    }
    return Prepared(
        name=name,
        input_shape=shape,
        engines=engines,
        twin=float_twin(model, images),
        kernels=kernels(engines["float16"], accepted(engines["float16"], images[:1], "float16")),
    )


def file_of(name: str, folder: Path | None = None) -> Path:
    return (folder or run_folder()) / f"{name.replace('/', '-')}.pkl"


def accepted(engine: Engine, images: Tensor, stream: str) -> Tensor:
    """Return images in the stream's dtype where the engine takes that, else as they are."""
    half = images.to(STREAMS[stream])
    try:
        engine(half[:1])
    except TypeError:
        return images
    return half


def save(prepared: Prepared, path: Path) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        pickle.dump(vars(prepared), file)
    part.replace(path)
    if prepared.kernels:
        work = {"network": prepared.name, "kernels": [one.to_dict() for one in prepared.kernels]}
        path.with_suffix(".kernels.json").write_text(json.dumps(work), encoding="utf-8")


def load(path: Path) -> Prepared:
    """Read what this very check wrote."""
    with path.open("rb") as file:
        values: dict[str, Any] = pickle.load(file)
    return Prepared(**values)


def rivals_by_importance() -> list[tuple[str, int, str]]:
    """Return network, batch and dtype of what `torch.compile` compiles, the first first."""
    first, *others = BINARY
    important = [
        *((first, 256, "float16"), (first, 1, "float16"), (first, 256, "bfloat16")),
        *((name, 256, "float16") for name in (*FLOAT, *others)),
        *((name, 1, "float16") for name in (*FLOAT, *others)),
    ]
    every = (
        (name, batch, dtype)
        for dtype in ("float16", "bfloat16")
        for batch in BATCHES
        for name in NETWORKS
    )
    return list(dict.fromkeys([*important, *every]))


def convert_all(seconds: float) -> dict[str, str]:
    """Convert every network, each in a process of its own, and return why some are not there."""
    threads = max(1, (os.cpu_count() or 1) // len(NETWORKS))
    # The reference, since the extension is being built, and may be replaced while it is in use.
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "BIPER_BACKEND": "reference",
    }
    groups = {name: Group(python(__file__, name), log_of(name), environment) for name in NETWORKS}
    deadline, reasons = Deadline(seconds), {}
    try:
        for name, group in groups.items():
            status = group.wait(deadline.left_s())
            if status is None:
                reasons[name] = f"not converted in {seconds:.0f} s"
            elif status:
                reasons[name] = last_line(log_of(name))
            print(f"{name}: {reasons.get(name, 'converted')}")
    finally:
        for group in groups.values():
            group.stop()
    return reasons


def log_of(name: str) -> Path:
    return run_folder() / f"prepare-{name.replace('/', '-')}.log"


def compile_ahead(deadline: Deadline, absent: dict[str, str]) -> int:
    """Fill the caches of `torch.compile` until the extension is built; return how many it did."""
    done = []

    def compiled(name: str, batch: int, dtype: str) -> None:
        if (run_folder() / "build.json").exists():
            return
        words = [name, "--batch", str(batch), "--compile", dtype, "--warm"]
        contest = str(Path(__file__).with_name("gpu_contest.py"))
        log = run_folder() / f"compile-{name.replace('/', '-')}-{batch}-{dtype}.log"
        group = Group(python(contest, *words), log)
        try:
            status = group.wait(min(COMPILE_S, deadline.left_s()))
        finally:
            group.stop()
        done.extend([name] * (status == 0))
        print(f"compile {name}, batch {batch}, {dtype}: {last_line(log)}")

    jobs = [
        Job(
            name=f"{name} {batch} {dtype}",
            needs_s=20,
            run=lambda r=(name, batch, dtype): compiled(*r),
        )
        for name, batch, dtype in rivals_by_importance()
        if name not in absent
    ]
    do(jobs, deadline, tell=lambda line: None)
    return len(done)


def main(words: list[str]) -> int:
    if words:
        save(prepare(words[0]), file_of(words[0]))
        print(f"{words[0]}: converted")
        return 0
    absent = missing("typer", "safetensors")
    if absent:
        print(f"not installed: {', '.join(absent)}; networks cannot be made without")
        return 1
    deadline = Deadline.of_step(150)
    reasons = convert_all(min(CONVERT_S, deadline.left_s()))
    ahead = 0
    if no_gpu() is None:
        ahead = compile_ahead(deadline, reasons)
    print(f"{len(NETWORKS) - len(reasons)} networks converted, {ahead} rivals compiled ahead")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
