"""One network on the GPU, in a process that can be stopped: checked first, then timed in turn.

    gpu_contest.py NETWORK --batch N [--batch N ...]         backend cuda, and the eager twin
    gpu_contest.py NETWORK --batch N [--batch N ...] --triton    backend triton beside both
    gpu_contest.py NETWORK --batch N --compile DTYPE         torch.compile beside ours and eager
    gpu_contest.py NETWORK --batch N --compile DTYPE --warm  compile only

It appends a line of JSON to networks.jsonl as soon as it knows one, so that what it knew is kept
when it is stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

import torch
from gpu_machine import no_gpu, run_folder
from gpu_prepare import STREAMS, Prepared, accepted, file_of, load
from gpu_timer import Contender, Taken, clock_of, turns
from torch import Tensor, fx, nn

from biper_engine import use_backend
from biper_engine.bench.rivals.rival import TOLERANCE, first_line
from biper_engine.bench.timer import Budget
from biper_engine.errors import BiperError

LINES = "networks.jsonl"
CUDA = (("cuda", "float32"), ("cuda", "float16"), ("cuda", "bfloat16"))
TRITON = (("triton", "float32"), ("triton", "float16"))
BEST = "cuda float16"
BUDGET = Budget(seconds=1.2, fewest=5, most=100, warmup=0)
CHECKED_IMAGES = 32
# One bit on its threshold that flips changes an image; a wrong graph changes all of them.
AGREEING_SHARE = 0.5
RANDOM_IMAGES = {"cifar10": 1024}
FEWER_IMAGES = 256
_FAILURES = (BiperError, RuntimeError, TypeError, NotImplementedError)


@dataclass
class Checks:
    """What was found out before anything is timed.

    Attributes:
        nodes: by "backend stream": operators compared with the reference, and those that differ.
        images: by backend: exact images that agree with the reference's, and how many were tried.
        top1: by "backend stream": random images with the exact mode's class, and how many.
        reasons: by "backend stream": why it is not timed.
    """

    nodes: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    top1: dict[str, tuple[int, int]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def images_of(shape: Sequence[int], batch: int, device: torch.device, seed: int = 0) -> Tensor:
    """Return seeded random images on a device, in channels_last memory."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, *shape, generator=generator)
    return images.to(device).contiguous(memory_format=torch.channels_last)


def check(prepared: Prepared, device: torch.device, ours: Sequence[tuple[str, str]]) -> Checks:
    """Compare our backends on a device: operators with the reference, then whole networks.

    Args:
        prepared: its engines move to the device.
        device: where.
        ours: pairs of a backend and a stream.
    """
    from biper_engine.serialization import check_backend

    found = Checks()
    shape = prepared.input_shape
    images = images_of(shape, CHECKED_IMAGES, device, seed=1)
    many = RANDOM_IMAGES.get(prepared.name.partition("/")[0], FEWER_IMAGES)
    random = images_of(shape, many, device, seed=2)
    exact = prepared.engines["float32"]
    with use_backend("reference"):
        wanted = exact(images)
    exactly: Tensor | None = None
    for backend, stream in ours:
        name, engine = f"{backend} {stream}", prepared.engines[stream]
        try:
            inputs = [images_of(shape, 2, device)]
            rows = check_backend(engine, backend, inputs=inputs).nodes
            wrong = [
                f"{row.node} ({row.different} of {row.total})" for row in rows if row.different
            ]
            found.nodes[name] = (len(rows), wrong)
            with use_backend(backend):
                if stream == "float32":
                    found.images[backend] = agreeing(exact(images), wanted)
                    exactly = exact(random).argmax(1)
                else:
                    classes = engine(accepted(engine, random, stream)).argmax(1)
                    if exactly is not None:
                        found.top1[name] = (int((classes == exactly).sum()), many)
        except _FAILURES as error:
            found.reasons[name] = first_line(error)
            continue
        if wrong:
            found.reasons[name] = f"WRONG: {len(wrong)} of {len(rows)} operators, {wrong[0]}"
        elif stream == "float32" and found.images[backend][0] < AGREEING_SHARE * len(images):
            agreed = found.images[backend][0]
            found.reasons[name] = f"WRONG: it agrees on {agreed} of {len(images)} images only"
    return found


def agreeing(outputs: Tensor, wanted: Tensor) -> tuple[int, int]:
    """Return how many images agree to `TOLERANCE` of the norm of their outputs, and all."""
    errors = (outputs - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    return int((errors <= TOLERANCE).sum()), len(wanted)


@dataclass
class Ours:
    """Our engines that run here.

    Attributes:
        contenders: their calls, warmed up.
        dtypes: by name: of the images that each takes.
        executions: by name: how it runs then, as `Engine.execution` says.
    """

    contenders: list[Contender] = field(default_factory=list)
    dtypes: dict[str, str] = field(default_factory=dict)
    executions: dict[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"image_dtypes": self.dtypes, "execution": self.executions}

    def uncaptured(self) -> dict[str, str]:
        """Return how those run whose calls are not one CUDA graph, by name."""
        return {
            name: text
            for name, text in self.executions.items()
            if not text.startswith("one CUDA graph") or "operator by operator" in text
        }


def our_contenders(
    prepared: Prepared, images: Tensor, reasons: dict[str, str], ours: Sequence[tuple[str, str]]
) -> Ours:
    """Return our engines that run here, each a copy of its own.

    An engine has a plan for one backend at a time: turns of two would each make it anew.

    Args:
        prepared: its engines are on the images' device.
        images: float32.
        reasons: of those that do not run; more are added.
        ours: pairs of a backend and a stream.
    """
    found = Ours()
    for backend, stream in ours:
        name = f"{backend} {stream}"
        if name in reasons:
            continue
        engine = copy.deepcopy(prepared.engines[stream])
        try:
            with use_backend(backend):
                taken = accepted(engine, images, stream)
                for _ in range(3):  # a CUDA graph is captured at the second
                    engine(taken)
                found.executions[name] = engine.execution
        except _FAILURES as error:
            reasons[name] = first_line(error)
            continue
        found.dtypes[name] = str(taken.dtype).removeprefix("torch.")
        around = partial(use_backend, backend)
        found.contenders.append(Contender(name=name, call=partial(engine, taken), around=around))
    return found


def twin_on(twin: fx.GraphModule, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return a copy of a float network on a device, in channels_last memory."""
    network = copy.deepcopy(twin).eval().requires_grad_(False).to(device, dtype)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def eager_contender(prepared: Prepared, images: Tensor) -> Contender:
    """Return the twin in eager float16."""
    network = twin_on(prepared.twin, torch.float16, images.device)
    return Contender(name="eager float16", call=partial(network, images.half()))


def compiled_contender(
    prepared: Prepared, images: Tensor, dtype: str
) -> tuple[Contender, float, float]:
    """Return the twin through `torch.compile(mode="max-autotune")`, which has CUDA graphs.

    Returns:
        Its call, the seconds until its first answer, and the largest difference from eager over
        the largest output.

    Raises:
        RuntimeError: it does not compile.
    """
    network = twin_on(prepared.twin, STREAMS[dtype], images.device)
    half = images.to(STREAMS[dtype])
    wanted = network(half)[0].float()
    start = monotonic()
    compiled = torch.compile(network, mode="max-autotune", dynamic=False)
    got = compiled(half)[0].float()
    clock_of(images.device).synchronize()
    seconds = monotonic() - start
    for _ in range(3):  # CUDA graphs are recorded behind the first
        compiled(half)
    difference = float((got - wanted).abs().max()) / (float(wanted.abs().max()) or 1.0)
    return Contender(name=f"compile {dtype}", call=partial(compiled, half)), seconds, difference


def best() -> tuple[str, str]:
    """Return backend and stream of what rivals are timed beside."""
    backend, _, stream = BEST.partition(" ")
    return backend, stream


def contest(contenders: Sequence[Contender], device: torch.device) -> dict[str, Any]:
    """Time contestants in turn and return JSON values by name."""
    taken: dict[str, Taken] = turns(contenders, clock_of(device), BUDGET)
    return {name: found.to_dict() for name, found in taken.items()}


def told(batch: int, taken: dict[str, Any]) -> str:
    """Return images a second of each contestant in a line."""
    cells = [
        f"{name} {1e3 * batch / found['throughput_ms']:,.0f}/s ({1e3 * found['latency_ms']:.0f} us)"
        for name, found in taken.items()
    ]
    return "; ".join(cells)


def append(values: dict[str, Any]) -> None:
    with (run_folder() / LINES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def run_ours(
    prepared: Prepared,
    batches: Sequence[int],
    device: torch.device,
    group: str,
    ours: Sequence[tuple[str, str]],
) -> bool:
    """Check and time our backends beside the eager twin; tell whether nothing is wrong.

    Args:
        prepared: its engines move to the device.
        batches: images per call, one after another.
        device: where.
        group: "cuda" or "triton"; beside others than it, its best is timed, too.
        ours: pairs of a backend and a stream; none where there is no engine.
    """
    for engine in prepared.engines.values():
        engine.to(device)
    checks = check(prepared, device, ours) if ours else Checks()
    append({"kind": "checks", "network": prepared.name, **vars(checks)})
    for name, why in checks.reasons.items():
        print(f"{prepared.name} {name}: {why}")
    beside = [] if best() in ours or not ours else [best()]
    for batch in batches:
        time_ours(prepared, batch, device, group, [*ours, *beside], dict(checks.reasons))
    return not any(why.startswith("WRONG") for why in checks.reasons.values())


def time_ours(
    prepared: Prepared,
    batch: int,
    device: torch.device,
    group: str,
    ours: Sequence[tuple[str, str]],
    reasons: dict[str, str],
) -> None:
    """Time our backends beside the eager twin at one batch size, whose memory is free then."""
    images = images_of(prepared.input_shape, batch, device)
    found = our_contenders(prepared, images, reasons, ours)
    taken = contest([*found.contenders, eager_contender(prepared, images)], device)
    line = {"kind": "contest", "network": prepared.name, "batch": batch, "group": group}
    append({**line, "taken": taken, **found.values(), "did_not_run": reasons})
    report(prepared.name, batch, taken, found)


def report(network: str, batch: int, taken: dict[str, Any], found: Ours, more: str = "") -> None:
    """Print a contest, and who of ours is not in a CUDA graph."""
    print(f"{network}, batch {batch}: {told(batch, taken)}{more}")
    for name, text in found.uncaptured().items():
        print(f"{network}, batch {batch}: {name} runs {text}")


def run_compiled(
    prepared: Prepared, batch: int, dtype: str, device: torch.device, *, warm: bool
) -> bool:
    """Compile the twin, and time it beside our best backend and eager; tell whether it runs."""
    images = images_of(prepared.input_shape, batch, device)
    try:
        rival, seconds, difference = compiled_contender(prepared, images, dtype)
    except RuntimeError as error:
        values = {"network": prepared.name, "batch": batch, "rival": f"compile {dtype}"}
        append({"kind": "failed", **values, "reason": first_line(error)})
        print(f"{prepared.name}, batch {batch}, {dtype}: {first_line(error)}")
        return False
    if warm:
        print(f"compiled in {seconds:.0f} s, {difference:.1e} from eager")
        return True
    reasons: dict[str, str] = {}
    found = Ours()
    if prepared.engines:
        prepared.engines["float16"].to(device)
        found = our_contenders(prepared, images, reasons, [best()])
    taken = contest([*found.contenders, rival, eager_contender(prepared, images)], device)
    line = {"kind": "contest", "network": prepared.name, "batch": batch, "group": rival.name}
    more = {"did_not_run": reasons, "compile_s": seconds, "difference": difference}
    append({**line, "taken": taken, **found.values(), **more})
    report(prepared.name, batch, taken, found, f"; compiled in {seconds:.0f} s")
    return True


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network")
    parser.add_argument("--batch", type=int, action="append", required=True)
    parser.add_argument("--compile", choices=list(STREAMS), help="dtype of the rival")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--triton", action="store_true")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    options = arguments(words)
    reason = no_gpu()
    if reason is not None:
        print(f"no GPU: {reason}")
        return 1
    device = torch.device("cuda")
    prepared = load(file_of(options.network))
    group, ours = ("triton", TRITON) if options.triton else ("cuda", CUDA)
    if not prepared.engines:
        ours = ()
    work: Callable[[], bool] = partial(run_ours, prepared, options.batch, device, group, ours)
    if options.compile:
        (batch,) = options.batch
        work = partial(run_compiled, prepared, batch, options.compile, device, warm=options.warm)
    with torch.inference_mode():
        return 0 if work() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
