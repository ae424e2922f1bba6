"""The work of a phase: callers in long-lived threads, and their disturbances."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import biper_engine
from biper_engine import _cpu  # type: ignore[attr-defined]
from biper_engine.ops.cpu_module import torch_parallel_region
from tests.soak import handing
from tests.soak.subjects import WEIGHTS, Subject

CORES = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 4)
CALLERS = 2 * CORES + 1
CHILD_SECONDS = 120
OTHER_SIZES = (32, 64, 128, 256)
OTHER_WORK = ("product", "convolution", "sort", "sum")
FEW = tuple(sorted({1, 2, CORES}))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is special in a phase.

    Attributes:
        callers: threads that call engines at once.
        threads: torch's threads of a call; one of them is drawn.
        forced: BIPER_NUM_THREADS, if set.
        hogs: processes beside this one that only burn time.
        own: calls run on our own pool of threads, not on those of torch's OpenMP.
        renews: callers also copy, save, load and drop engines, and load other weights.
        forks: child processes run engines, forked while callers run native programs.
        hands_over: engines go to a spawned process and back to memory of their own, are traced and
            recorded, and their files are loaded, while callers run them.
    """

    name: str
    callers: int = CORES
    threads: tuple[int, ...] = FEW
    forced: int | None = None
    hogs: int = 0
    own: bool = False
    renews: bool = False
    forks: bool = False
    hands_over: bool = False


# A round of phases. CORES are the processors at hand, four at most.
KINDS = (
    Kind(name="one caller", callers=1, threads=(CORES,)),
    Kind(name="several callers"),
    Kind(name="too many callers", callers=CALLERS, threads=(CORES,)),
    Kind(name="too many threads", forced=3 * CORES),
    Kind(name="cores taken", threads=(CORES,), hogs=CORES),
    Kind(name="our own pool", callers=CORES + 1, own=True),
    Kind(name="engines renewed", renews=True),
    Kind(name="forks", forks=True),
    Kind(name="engines handed on", hands_over=True),
)
THREADS = tuple(sorted({count for kind in KINDS for count in kind.threads} | {1}))


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a soak: `index` counts from 0, and with `seed` decides what is drawn."""

    index: int
    seed: int
    seconds: float
    first_round: bool

    @property
    def kind(self) -> Kind:
        return KINDS[self.index % len(KINDS)]

    def random(self, who: str) -> random.Random:
        return random.Random(f"{self.seed}/{self.index}/{who}")

    @property
    def threads(self) -> int:
        return self.random("threads").choice(self.kind.threads)


@dataclass
class Tally:
    """What was done, and the seconds of each call."""

    seconds: array[float] = field(default_factory=lambda: array("f"))
    images: int = 0
    renewals: int = 0
    children: int = 0

    def add(self, other: Tally) -> None:
        self.seconds.extend(other.seconds)
        self.images += other.images
        self.renewals += other.renewals
        self.children += other.children

    def latency(self) -> str:
        if not self.seconds:
            return "no call"
        median, worst = statistics.median(self.seconds) * 1e3, max(self.seconds) * 1e3
        return f"median {median:7.2f} ms, worst {worst:7.1f} ms"


# -- callers --------------------------------------------------------------------------------------


class Caller:
    """A thread that calls engines, phase after phase."""

    def __init__(self, number: int, subjects: Sequence[Subject], folder: Path) -> None:
        self._number = number
        self._subjects = subjects
        self._folder = folder
        self._thread = ThreadPoolExecutor(1)

    def warm_up(self) -> Future[None]:
        return self._thread.submit(_all_other_work)

    def set_threads(self, threads: int) -> Future[None]:
        return self._thread.submit(
            torch.set_num_threads, threads
        )  # PyTorch has one for each thread

    def work(self, phase: Phase) -> Future[Tally]:
        return self._thread.submit(self._work, phase)

    def close(self) -> None:
        self._thread.shutdown()

    def _work(self, phase: Phase) -> Tally:
        end = time.monotonic() + phase.seconds
        rng = phase.random(f"caller {self._number}")
        tally = Tally()
        # A child would wait for ever for a lock of oneDNN's that another thread held at the fork.
        subjects = [s for s in self._subjects if s.native or not phase.kind.forks]
        if phase.first_round:  # afterwards no call needs more memory than one before
            for subject in subjects:
                self._call(subject, rng, tally, largest=True)
        while time.monotonic() < end:
            subject = rng.choice(subjects)
            self._call(subject, rng, tally)
            if phase.kind.renews and rng.random() < 0.2:
                self._renew(subject, rng)
                tally.renewals += 1
            if not phase.kind.forks and rng.random() < 0.05:
                _other_work(rng.choice(OTHER_SIZES), rng.choice(OTHER_WORK))
        return tally

    def _call(
        self, subject: Subject, rng: random.Random, tally: Tally, *, largest: bool = False
    ) -> None:
        batch = subject.draw(rng, largest=largest)
        images = subject.input(batch)
        start = time.perf_counter()
        logits = subject.engine(images)
        tally.seconds.append(time.perf_counter() - start)
        tally.images += len(images)
        subject.check(batch, logits)

    def _renew(self, subject: Subject, rng: random.Random) -> None:
        """Load an engine, change its weights, write and read those, and drop it all."""
        engine = biper_engine.load(subject.path)
        subject.call(engine, rng)
        engine.load_state_dict(subject.states[WEIGHTS[1]])
        subject.call(engine, rng, WEIGHTS[1])
        path = self._folder / f"caller-{self._number}.biper"
        engine.save(path)
        engine.load_state_dict(subject.states[WEIGHTS[0]])
        subject.call(engine, rng)
        subject.call(biper_engine.load(path), rng, WEIGHTS[1])
        path.unlink()


def _other_work(size: int, what: str) -> None:
    """Do something else with PyTorch: on its threads, in its memory."""
    match what:
        case "product":
            torch.randn(size, size) @ torch.randn(size, size)
        case "convolution":
            F.conv2d(torch.randn(4, 16, 32, 32), torch.randn(size, 16, 3, 3))
        case "sort":
            torch.randn(size * 256).sort()
        case "sum":
            torch.zeros(size << 12).add_(1.0)


def _all_other_work() -> None:
    """Do all of it by each number of threads: oneDNN keeps memory for each of its convolutions."""
    for threads in THREADS:
        torch.set_num_threads(threads)
        for what in OTHER_WORK:
            for size in OTHER_SIZES:
                _other_work(size, what)


# -- what disturbs them ---------------------------------------------------------------------------


@contextmanager
def _hogs(count: int, seconds: float) -> Iterator[None]:
    """Keep processors busy; by itself no longer than twice the phase, should this process die."""
    code = f"import time\nend = time.monotonic() + {2 * seconds + 10}\n"
    code += "while time.monotonic() < end: pass"
    running = [subprocess.Popen([sys.executable, "-I", "-S", "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@contextmanager
def _forced_threads(count: int | None) -> Iterator[None]:
    before = os.environ.pop("BIPER_NUM_THREADS", None)
    if count is not None:
        os.environ["BIPER_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        os.environ.pop("BIPER_NUM_THREADS", None)
        if before is not None:
            os.environ["BIPER_NUM_THREADS"] = before


@contextmanager
def _own_pool(wanted: bool) -> Iterator[None]:
    if wanted:
        _cpu.share_threads(0)
    try:
        yield
    finally:
        _cpu.share_threads(torch_parallel_region())


def _fork(phase: Phase, subjects: Sequence[Subject]) -> int:
    """Fork children, one after the other, until the phase ends; return how many."""
    rng = phase.random("children")
    context: Any = multiprocessing.get_context("fork")
    end = time.monotonic() + phase.seconds
    children = 0
    while time.monotonic() < end:
        arguments = (rng.choice(subjects), rng.randrange(2**32))
        child = context.Process(target=_in_child, args=arguments)
        handing.run_child(child, f"a forked child that ran {arguments[0].name}", CHILD_SECONDS)
        children += 1
        time.sleep(0.02)
    return children


def _in_child(subject: Subject, seed: int) -> None:
    torch.set_num_threads(1)  # as DataLoader does in its workers: torch's own threads cannot fork
    os.environ["BIPER_NUM_THREADS"] = str(CORES)
    rng = random.Random(seed)
    for _ in range(5):
        subject.call(subject.engine, rng)


# -- a phase --------------------------------------------------------------------------------------


def run_phase(phase: Phase, callers: Sequence[Caller], subjects: Sequence[Subject]) -> Tally:
    """Run a phase to its end.

    Raises:
        DifferenceError: a result differed; or whatever else a call raised.
    """
    kind = phase.kind
    for future in [caller.set_threads(phase.threads) for caller in callers]:
        future.result()
    total = Tally()
    with ExitStack() as stack:
        stack.enter_context(_forced_threads(kind.forced))
        stack.enter_context(_own_pool(kind.own))
        stack.enter_context(_hogs(kind.hogs, phase.seconds))
        working = [caller.work(phase) for caller in callers[: kind.callers]]
        if kind.forks:
            total.children = _fork(phase, subjects)
        if kind.hands_over:
            total.children = handing.hand_over(
                subjects,
                phase.random("handing over"),
                phase.seconds,
                CHILD_SECONDS,
                trace=phase.first_round,
            )
        for future in working:
            total.add(future.result())
    return total


def rounds_of(minutes: float, phase_seconds: float) -> int:
    return math.floor(minutes * 60 / (phase_seconds * len(KINDS)))
