"""Whole networks on the GPU: converted, checked, then timed with their float twins.

python -m gpu.networks prepare
python -m gpu.networks run NETWORK --batch N [--batch N ...] [--backend NAME] [--rival]
"""

from __future__ import annotations

import argparse
import copy
import pickle
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from biper_engine import Engine, convert, use_backend
from biper_engine.bench.rivals.rival import TOLERANCE, first_line
from biper_engine.errors import BiperError
from gpu.record import append
from gpu.target import Skipped, Target, Wrong, run_step, work_folder

NETWORKS = (
    *("imagenet/resnet18_1w1a", "cifar10/vgg_small_1w1a", "cifar10/resnet18_1w1a"),
    *("cifar10/resnet20_1w1a", "imagenet/resnet34_1w1a", "imagenet/mobilenet_1w1a"),
)
STREAMS = {"float16": torch.float16, "float32": torch.float32}
TURNS = 3
FEWEST, CALLS, CALLS_MS = 3, 20, 300.0
CHECKED_IMAGES = 16
# A flipped bit on its threshold changes one image; a wrong graph changes all of them.
AGREEING_SHARE = 0.5
_FAILURES = (BiperError, RuntimeError, TypeError, NotImplementedError)


class Prepared(NamedTuple):
    """A network: its name, shape of an image, engines by stream, and float twin in float32."""

    name: str
    input_shape: tuple[int, ...]
    engines: dict[str, Engine]
    twin: fx.GraphModule


def prepare(name: str, here: Target) -> Prepared:
    """Convert a network for every stream on the CPU, and make its float twin."""
    from biper_engine.conversion.twin import float_twin

    model: Any = here.network(name)
    images = torch.randn(2, *model.input_shape, generator=torch.Generator().manual_seed(0))
    # Tests check the conversion; `check` compares devices.
    convert_to = partial(convert, model, images, check=False)
    engines = {stream: convert_to(compute_dtype=dtype) for stream, dtype in STREAMS.items()}
    return Prepared(name, tuple(model.input_shape), engines, float_twin(model, images))


def file_of(name: str) -> Path:
    return work_folder() / f"{name.replace('/', '-')}.pkl"


def prepare_all(here: Target) -> str:
    """Convert the networks, the most important first; each is available as soon as it is done."""
    for name in NETWORKS:
        start, path = monotonic(), file_of(name)
        # The extensions are being built, and may be replaced while they are in use.
        with use_backend("reference"), torch.inference_mode(False):
            found = prepare(name, here)
        part = path.with_suffix(".part")
        part.write_bytes(pickle.dumps(found._asdict()))
        part.replace(path)
        append("prepared", network=name, seconds=monotonic() - start)
    return f"{len(NETWORKS)} networks converted"


def load(name: str) -> Prepared:
    """Read a network that `prepare_all` wrote, or raise Skipped."""
    if not file_of(name).exists():
        raise Skipped(f"{name} is missing: the step prepare did not convert it")
    return Prepared(**pickle.loads(file_of(name).read_bytes()))


def images_of(found: Prepared, batch: int, here: Target, seed: int = 0) -> Tensor:
    """Return seeded random images on the device, in channels_last memory."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(min(batch, here.most_images), *found.input_shape, generator=generator)
    return images.to(here.device).contiguous(memory_format=torch.channels_last)


def check(found: Prepared, stream: str, backend: str, here: Target) -> bool:
    """Compare an engine on a backend with the reference.

    Raises:
        Wrong: the bytes of an operator or the outputs of the exact network differ.
    """
    from biper_engine.serialization import check_backend

    engine = found.engines[stream]
    rows = check_backend(engine, backend, inputs=[images_of(found, 2, here)]).nodes
    wrong = [f"{row.node} ({row.different} of {row.total})" for row in rows if row.different]
    line: dict[str, Any] = {"network": found.name, "who": f"{backend} {stream}"}
    if stream == "float32":
        images = images_of(found, CHECKED_IMAGES, here, seed=1)
        with use_backend("reference"):
            wanted = engine(images)
        with use_backend(backend):
            agreed, tried = line["images"] = agreeing(engine(images), wanted)
        if agreed < AGREEING_SHARE * tried:
            wrong.append(f"it agrees with the reference on only {agreed} of {tried} images")
    append("check", **line, operators=len(rows), wrong=wrong)
    if wrong:
        raise Wrong(f"WRONG: {', '.join(wrong)}")
    return True


def agreeing(outputs: Tensor, wanted: Tensor) -> tuple[int, int]:
    """Return how many images agree to `TOLERANCE` of their outputs' norm, and the total."""
    errors = (outputs - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    return int((errors <= TOLERANCE).sum()), len(wanted)


# -- times ----------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """A contestant: a call that puts work on the device, and the same call as a user makes it.

    `around` is entered anew for each turn, such as a forced backend; `facts` are for the results.
    """

    name: str
    call: Callable[[], Any]
    alone: Callable[[], Any]
    around: Callable[[], Any] = nullcontext
    facts: dict[str, Any] = {}  # noqa: RUF012  (of a NamedTuple, and never changed)


def ours(found: Prepared, stream: str, backend: str, images: Tensor) -> Contender:
    """Return a copy of our engine with its own plan, warmed up."""
    engine = copy.deepcopy(found.engines[stream])
    call, around = partial(engine, images), partial(use_backend, backend)
    with around():
        for _ in range(3):  # the second call captures a CUDA graph
            call()
        facts = {"execution": engine.execution}
    return Contender(f"{backend} {stream}", call, call, around, facts)


def eager(found: Prepared, images: Tensor) -> Contender:
    """Return the float twin in eager PyTorch, float16 in channels_last memory."""
    network: Any = copy.deepcopy(found.twin).eval().requires_grad_(False)
    network = network.to(images.device, torch.float16).to(memory_format=torch.channels_last)
    call = partial(network, images.half())
    return Contender("eager float16", call, call)


def compiled(found: Prepared, images: Tensor, here: Target) -> Contender:
    """Return the twin compiled by `torch.compile`; a single call replays a CUDA graph."""
    start, twin = monotonic(), eager(found, images).call
    wanted = twin()[0].float()
    call = partial(here.compiled(twin.func), *twin.args)  # type: ignore[attr-defined]
    difference = (call()[0].float() - wanted).abs().max() / wanted.abs().max()
    here.synchronize()
    facts = {"compile_s": monotonic() - start, "difference": float(difference)}
    return Contender("compile float16", call, here.graphed(call), facts=facts)


def contest(contenders: Sequence[Contender], here: Target, **where: Any) -> list[str]:
    """Time contestants in turn, so that clock drift affects all; return those that failed."""
    failed: list[str] = []
    for one in contenders:
        append("contender", **where, who=one.name, **one.facts)
    for turn, one in ((turn, one) for turn in range(TURNS) for one in contenders):
        if one.name in failed:
            continue
        who = {**where, "who": one.name, "turn": turn}
        try:
            with one.around():
                samples = here.graph_ms(one.call)
                append("time", **who, ms=samples)
                append("call", **who, ms=alone_ms(one.alone, here))
            print(f"{who}: {statistics.median(samples):.4f} ms in a graph")
        except _FAILURES as error:
            append("refused", **who, reason=first_line(error))
            failed.append(f"{one.name}: {first_line(error)}")
    return failed


def alone_ms(call: Callable[[], object], here: Target) -> list[float]:
    """Return milliseconds from a call until the device is done, without other work."""
    found: list[float] = []
    while len(found) < FEWEST or (len(found) < CALLS and sum(found) < CALLS_MS):
        here.synchronize()
        start = perf_counter()
        call()
        here.synchronize()
        found.append(1e3 * (perf_counter() - start))
    return found


def run(here: Target, words: argparse.Namespace) -> str:
    """Check and time a network at some batch sizes.

    Raises:
        Wrong: a contestant differs from the reference or cannot run; the others were timed.
    """
    found, failed = load(words.network), []
    for engine in found.engines.values():
        engine.to(here.device)

    def tried(who: str, work: Callable[..., Any], *operands: Any) -> Any:
        try:
            return work(*operands)
        except (Wrong, *_FAILURES) as error:
            where = {"step": words.step, "network": found.name, "who": who}
            append("refused", **where, reason=first_line(error))
            failed.append(f"{who}: {first_line(error)}")

    streams = ["float16"] if words.rival else list(STREAMS)
    streams = [one for one in streams if tried(one, check, found, one, words.backend, here)]
    for batch in words.batch:
        images = images_of(found, batch, here)
        made = [tried(one, ours, found, one, words.backend, images) for one in streams]
        if words.rival:
            made.append(tried("compile", compiled, found, images, here))
        made.append(tried("eager", eager, found, images))
        where = {"step": words.step, "network": found.name, "batch": batch}
        failed += contest([one for one in made if one], here, **where)
    if failed:
        raise Wrong("; ".join(failed))
    return f"{found.name} timed at batch {', '.join(map(str, words.batch))}"


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["prepare", "run"])
    parser.add_argument("network", nargs="?", choices=NETWORKS)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--rival", action="store_true")
    parser.add_argument("--step", default="networks")
    return parser.parse_args(words)


if __name__ == "__main__":
    options = arguments(sys.argv[1:])
    sys.exit(run_step(prepare_all if options.what == "prepare" else partial(run, words=options)))
