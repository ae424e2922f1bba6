"""The steps of `benchmarks/gpu_check.sh`, the most valuable first, within a time limit.

    bash benchmarks/gpu_check.sh --minutes 4
    bash benchmarks/gpu_check.sh --steps build tests
    bash benchmarks/gpu_check.sh --rehearse

Each step is a separate process with a time limit. A step that fails, hangs or breaks the GPU is
recorded and does not stop the others. benchmarks/README.md describes each step.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from time import monotonic, sleep, time
from types import FrameType
from typing import Any

from gpu.processes import find_tool, last_line, python, start, stop
from gpu.record import RESULTS, append

ROOT = Path(__file__).resolve().parent.parent.parent
STAND_IN = "tests.benchmarks.gpu_stand_in"
SKIPPED = 3
CLOSING_S = 8.0  # for the plots of the report
SLOWER = 6.0  # limits of steps in a rehearsal, relative to those on a GPU
_POLL_S = 0.05

Ended = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A part of the check.

    Attributes:
        name, command: its name; arguments of `python -m`, the module first.
        most_s, least_s: seconds after which it is stopped; seconds that it needs to be started.
        share: largest share of the remaining time that it may take.
        needs, tool: steps, and a program, without which it is skipped.
        beside: runs beside the following steps, up to the first that is `alone`.
        alone: measures, and so waits until nothing else runs.
    """

    name: str
    command: Sequence[str]
    most_s: float
    least_s: float
    share: float = 1.0
    needs: Sequence[str] = ("machine",)
    tool: str = ""
    beside: bool = False
    alone: bool = True


_BUILT = ("machine", "build")
_RESNET = "imagenet/resnet18_1w1a"


def step(name: str, command: str, most_s: float, least_s: float, **more: Any) -> Step:
    return Step(name=name, command=command.split(), most_s=most_s, least_s=least_s, **more)


def network(name: str, words: str, most_s: float, least_s: float) -> Step:
    """Return a step that times a network."""
    needs = _BUILT[:1] if "--backend triton" in words else _BUILT
    return step(name, f"gpu.networks run {words} --step {name}", most_s, least_s, needs=needs)


STEPS = (
    step("machine", "gpu.device machine", 45, 0, needs=(), alone=False),
    step("prepare", "gpu.networks prepare", 150, 20, beside=True, alone=False),
    step("build", "gpu.device build", 240, 20, tool="nvcc", alone=False),
    step("tests", "gpu.tests cuda", 150, 20, share=0.5, needs=_BUILT, alone=False),
    network("resnet18", f"{_RESNET} --batch 256 --batch 1", 60, 12),
    step("counters", "gpu.layers counters", 60, 15, share=0.5, needs=_BUILT, tool="ncu"),
    network("compile", f"{_RESNET} --batch 256 --batch 1 --rival", 180, 40),
    network("vgg", "cifar10/vgg_small_1w1a --batch 256 --batch 1", 45, 12),
    network("cifar18", "cifar10/resnet18_1w1a --batch 256 --batch 1", 45, 12),
    network("cifar20", "cifar10/resnet20_1w1a --batch 256 --batch 1", 45, 12),
    network("batches", f"{_RESNET} --batch 64 --batch 8 --batch 1024", 75, 15),
    network("resnet34", "imagenet/resnet34_1w1a --batch 256 --batch 1", 60, 12),
    network("mobilenet", "imagenet/mobilenet_1w1a --batch 256 --batch 1", 60, 12),
    step("ceilings", "gpu.device ceilings", 45, 10, needs=_BUILT),
    step("layers", "gpu.layers times", 90, 15, needs=_BUILT),
    step("sanitizer", "gpu.tests sanitizer", 100, 30, needs=_BUILT, tool="compute-sanitizer"),
    step("triton-tests", "gpu.tests triton", 200, 30, share=0.7),
    network("triton", f"{_RESNET} --batch 256 --batch 1 --backend triton", 100, 25),
)
NAMES = tuple(step.name for step in STEPS)


@dataclass
class _Running:
    """A running step."""

    step: Step
    process: subprocess.Popen[bytes]
    log: Path
    offset: int
    begun: float
    limit_s: float


class Runner:
    """Runs steps within a time limit, and records the result of each.

    Args:
        out: folder of the results and logs.
        seconds: time limit for all steps.
        ended: called when a step's line is recorded.
    """

    def __init__(self, out: Path, seconds: float, ended: Ended = lambda: None) -> None:
        self.verdicts: dict[str, str] = {}
        self._out, self._ended = out, ended
        self._end = monotonic() + seconds
        self._running: list[_Running] = []

    def __call__(self, steps: Sequence[Step]) -> None:
        """Run the steps in order."""
        try:
            for step in steps:
                if step.alone:
                    self._wait()
                self._begin(step)
                if not step.beside:
                    self._wait(step)
            self._wait()
        finally:
            for running in self._running:
                stop(running.process)

    def obstacle(self, step: Step) -> str | None:
        """Return why a step cannot start now, or None."""
        for name in step.needs:  # a step that was not chosen counts as done before
            if self.verdicts.get(name, "ok") != "ok":
                return f"{name} was {self.verdicts[name]}"
        if step.tool and find_tool(step.tool) is None:
            return f"{step.tool} was not found"
        seconds = step.share * (self._end - monotonic())
        if seconds < step.least_s:
            return f"it needs {step.least_s:.0f} s, and {max(seconds, 0):.0f} s are left for it"
        return None

    def _begin(self, step: Step) -> None:
        reason = self.obstacle(step)
        if reason is not None:
            self._record(step.name, "skipped", 0.0, reason)
            return
        limit_s = min(step.most_s, step.share * (self._end - monotonic()))
        log = self._out / ("beside.txt" if step.beside else "log.txt")
        with log.open("a", encoding="utf-8") as file:
            file.write(f"===== {step.name}\n")
        offset, variables = log.stat().st_size, {"BIPER_GPU_STEP_END": f"{time() + limit_s:.1f}"}
        process = start(python(*step.command), log, variables)
        self._running.append(_Running(step, process, log, offset, monotonic(), limit_s))

    def _wait(self, step: Step | None = None) -> None:
        """Wait until a step or all steps have ended; stop those over their limit."""
        while any(step in (None, one.step) for one in self._running):
            for one in list(self._running):
                if one.process.poll() is not None or monotonic() >= one.begun + one.limit_s:
                    self._close(one)
            sleep(_POLL_S)

    def _close(self, running: _Running) -> None:
        status = running.process.poll()
        stop(running.process)  # also its child processes
        self._running.remove(running)
        told = last_line(running.log, running.offset)
        verdict = {0: "ok", SKIPPED: "skipped", None: "stopped"}.get(status, "failed")
        if status is None:
            told = f"at its limit of {running.limit_s:.0f} s; {told}"
        elif status < 0:
            told = f"ended by signal {-status}; {told}"
        self._record(running.step.name, verdict, monotonic() - running.begun, told)

    def _record(self, name: str, verdict: str, seconds: float, told: str) -> None:
        self.verdicts[name] = verdict
        append("step", name=name, verdict=verdict, seconds=seconds, told=told)
        print(f"{name:<13}{verdict:<8}{seconds:6.1f} s  {told}", flush=True)
        self._ended()


def environment(out: Path) -> dict[str, str]:
    """Return the environment of every step: its folders, and caches for compilers beside them."""
    work = Path(os.environ.get("BIPER_GPU_WORK") or ROOT / "build" / "gpu_check")
    return {
        "OUT": str(out),
        "BIPER_GPU_WORK": str(work),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TRITON_CACHE_DIR": str(work / "triton"),
    }


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; %(default)s")
    parser.add_argument("--steps", nargs="+", choices=NAMES, default=NAMES, metavar="STEP")
    parser.add_argument("--rehearse", action="store_true", help="on an emulator, small networks")
    return parser.parse_args(words)


def stopped(_number: int, _frame: FrameType | None) -> None:
    sys.exit("gpu_check was told to stop.")


def main(words: Sequence[str]) -> int:
    start_s, options = monotonic(), arguments(words)
    out = Path(os.environ.get("OUT") or "out").resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= environment(out)
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, stopped)  # exiting stops the steps
    if options.rehearse:
        os.environ |= import_module(STAND_IN).environment()
    append("run", minutes=options.minutes, steps=list(options.steps), rehearsal=options.rehearse)
    # This imports torch, which takes seconds, in the time of the first step.
    reports = ThreadPoolExecutor(1).submit(import_module, "gpu.report")
    seconds = 60 * options.minutes - CLOSING_S - (monotonic() - start_s)
    runner = Runner(out, seconds, lambda: reports.result().write_text(out))
    slower = SLOWER if options.rehearse else 1.0
    steps = [replace(one, most_s=one.most_s * slower) for one in STEPS if one.name in options.steps]
    try:
        runner(steps)
    finally:
        print(reports.result().write(out))
    print(f"{out / RESULTS}; python -m gpu.report FOLDER writes the report again.")
    found = set(runner.verdicts.values())
    return 0 if "ok" in found and found <= {"ok", "skipped"} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
