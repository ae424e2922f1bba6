"""The step `networks`: whole networks on the GPU beside their rivals, the most important first.

Each part runs in a process of its own (gpu_contest.py), so that one that hangs or breaks the GPU
can be stopped and costs no other. What does not fit into the time is skipped, and said.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from gpu_budget import Deadline, Job, do
from gpu_contest import BEST, LINES
from gpu_machine import keep, missing, no_gpu, run_folder
from gpu_prepare import BATCHES, BINARY, COMPILE_S, COMPILED_S, FLOAT, file_of, rivals_by_importance
from gpu_report import network_lines
from gpu_steps import Group, last_line, python

OURS_S = 25.0
MOST_OURS_S = 90.0
CONTEST = str(Path(__file__).with_name("gpu_contest.py"))


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process does.

    Attributes:
        network: its name.
        batches: images per call, one after another.
        against: what is timed beside our best backend: "triton", the dtype that `torch.compile`
            gets, or nothing but the eager twin.
        needs_s: seconds below which it is not begun.
        limit_s: seconds after which it is stopped.
    """

    network: str
    batches: tuple[int, ...]
    against: str = ""
    needs_s: float
    limit_s: float

    @property
    def name(self) -> str:
        what = {"": "cuda", "triton": "triton"}.get(self.against, f"compile {self.against}")
        return f"{self.network}, batch {', '.join(map(str, self.batches))}, {what}"

    @property
    def words(self) -> list[str]:
        """Arguments of gpu_contest.py."""
        batches = [word for batch in self.batches for word in ("--batch", str(batch))]
        return [self.network, *batches, *_OPTIONS.get(self.against, ("--compile", self.against))]


_OPTIONS = {"": (), "triton": ("--triton",)}


def ours(network: str, against: str = "") -> Part:
    return Part(
        network=network, batches=BATCHES, against=against, needs_s=OURS_S, limit_s=MOST_OURS_S
    )


def rival(network: str, batch: int, dtype: str) -> Part:
    return Part(
        network=network, batches=(batch,), against=dtype, needs_s=COMPILED_S, limit_s=COMPILE_S
    )


def parts() -> Iterator[Part]:
    """Give all parts, the most important first.

    That is ResNet-18 on cuda, its compiled rivals at batch 256 and 1, and triton; the other
    networks on cuda; then rivals as `rivals_by_importance` has them, with triton in between.
    """
    first, *others = BINARY
    compiled = [rival(*entry) for entry in rivals_by_importance()]
    yield ours(first)
    yield from compiled[:2]
    yield ours(first, "triton")
    yield from map(ours, others)
    yield from compiled[2:5]
    yield from (ours(network, "triton") for network in others)
    yield from map(ours, FLOAT)
    yield from compiled[5:]


def run_part(part: Part, left_s: Callable[[], float]) -> str | None:
    """Run a part in a process of its own; return why it failed, or None."""
    number = len(list(run_folder().glob("part-*.log")))
    log = run_folder() / f"part-{number}.log"
    group = Group(python(CONTEST, *part.words), log)
    allowed = min(part.limit_s, left_s())
    try:
        status = group.wait(allowed)
    finally:
        group.stop()
    print(log.read_text(encoding="utf-8", errors="replace").rstrip())
    if status is None:
        return f"stopped after {allowed:.0f} s"
    return None if status == 0 else last_line(log)


def measure(
    todo: Sequence[Part], deadline: Deadline, run: Callable[[Part], str | None]
) -> tuple[dict[str, str], dict[str, str]]:
    """Run parts while there is time.

    Returns:
        Why parts were skipped, and why others failed, by name.
    """
    failed: dict[str, str] = {}

    def one(part: Part) -> None:
        why = run(part)
        if why is not None:
            failed[part.name] = why
            print(f"FAILED {part.name}: {why}")

    jobs = (Job(name=part.name, needs_s=part.needs_s, run=partial(one, part)) for part in todo)
    return do(jobs, deadline), failed


def stopped(_number: int, _frame: FrameType | None) -> None:
    sys.exit("networks was stopped")


def main() -> int:
    reason = no_gpu()
    if reason is not None:
        print(f"no GPU: {reason}")
        return 1
    absent = missing("typer", "safetensors")
    if absent:
        print(f"not installed: {', '.join(absent)}; networks cannot be made without")
        return 1
    signal.signal(signal.SIGTERM, stopped)  # a process that exits stops its parts
    deadline = Deadline.of_step(300)
    todo = [part for part in parts() if file_of(part.network).exists()]
    skipped, failed = measure(todo, deadline, partial(run_part, left_s=deadline.left_s))
    unprepared = sorted({part.network for part in parts()} - {part.network for part in todo})
    skipped |= dict.fromkeys(unprepared, "the step prepare did not make it")
    keep("networks", {"skipped": skipped, "failed": failed})
    lines = run_folder() / LINES
    done = network_lines(lines) if lines.exists() else []
    timed = [line for line in done if line["kind"] == "contest"]
    best = sum(BEST in line["taken"] for line in timed)
    print(
        f"{len(timed)} contests timed, {BEST} in {best}; {len(failed)} failed, "
        f"{len(skipped)} skipped"
    )
    return 1 if failed or not best else 0


if __name__ == "__main__":
    sys.exit(main())
