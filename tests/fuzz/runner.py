"""Runs seeds in child processes, which may crash or hang, and summarises their results."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.bases import write_bases

ROOT = Path(__file__).resolve().parents[2]
_SEEDS_PER_CHILD = 500
_HANG_SECONDS = 60.0  # of the processor
_WAIT_SECONDS = 900.0  # of the clock, on which other processes count, too


@dataclass
class Summary:
    """What came of some seeds.

    Attributes:
        outcomes: how often each was.
        findings: what is wrong, by seed.
        slowest: the longest a seed took, in seconds, and which one.
        seconds: all of them took.
    """

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: dict[int, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, -1)
    seconds: float = 0.0
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)

    def __str__(self) -> str:
        lines = [f"{sum(self.outcomes.values()):,} seeds in {self.seconds:.0f} s"]
        lines += [f"{count:8,}  {outcome}" for outcome, count in self.outcomes.most_common()]
        lines.append(f"slowest: seed {self.slowest[1]}, {self.slowest[0]:.1f} s")
        lines.append(f"{len(self.findings)} findings")
        lines += [f"  seed {seed}: {what}" for seed, what in sorted(self.findings.items())]
        return "\n".join(lines)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add what a child said of a seed."""
        seed = int(line["seed"])
        self.outcomes[line["outcome"]] += 1
        self.slowest = max(self.slowest, (line.get("seconds", 0.0), seed))
        if "finding" in line:
            about = f"{line.get('base')}, {'+'.join(line.get('mutations', ()))}"
            self.findings[seed] = f"{line['finding']} [{about}]"


def fuzz(
    first: int,
    seeds: int | None,
    seconds: float | None,
    *,
    extension: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Summary:
    """Run seeds.

    Args:
        first: the first one.
        seeds: how many; None for as many as there is time for.
        seconds: how long to go on; None for no limit.
        extension: a build of biper_engine._cpu to use.
        environment: of the children; None for that of this process.
    """
    summary, start, seed = Summary(), time.monotonic(), first
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bases(folder)
        deadline = None if seconds is None else start + seconds
        while seeds is None or seed < first + seeds:
            if deadline is not None and time.monotonic() >= deadline:
                break
            last = seed + _SEEDS_PER_CHILD
            last = last if seeds is None else min(last, first + seeds)
            child = _Child(seed, last, folder, extension, environment)
            seed = child.watch(summary, deadline)
    summary.seconds = time.monotonic() - start
    return summary


class _Child:
    """A process that runs a range of seeds."""

    def __init__(
        self,
        first: int,
        last: int,
        folder: Path,
        extension: str | None,
        environment: Mapping[str, str] | None,
    ) -> None:
        self._first, self._last = first, last
        self._results = folder / f"{first}.jsonl"
        self._results.touch()
        self._errors = folder / f"{first}.err"
        words = [sys.executable, "-m", "tests.fuzz.worker", str(first), str(last)]
        words += [str(folder), str(self._results), *([extension] if extension else [])]
        variables = {**(environment or os.environ), "PYTHONPATH": str(ROOT)}
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(words, cwd=ROOT, env=variables, stderr=errors)

    def watch(self, summary: Summary, deadline: float | None) -> int:
        """Wait for the end, or end it; return the next seed to run."""
        done, begun, used, current = 0, time.monotonic(), 0.0, None
        while True:
            ended = self._process.poll() is not None
            lines = self._results.read_text(encoding="utf-8").splitlines()
            if len(lines) > done:
                done, begun, used = len(lines), time.monotonic(), self._processor_seconds()
                current = int(lines[-1]) if lines[-1].isdigit() else None
            hangs = (
                self._processor_seconds() - used > _HANG_SECONDS
                or time.monotonic() - begun > _WAIT_SECONDS
            )
            out_of_time = deadline is not None and time.monotonic() > deadline
            if ended or hangs or out_of_time:
                break
            time.sleep(0.2)
        if not ended:
            self._process.kill()
        status = self._process.wait()
        return self._sum_up(summary, status, current, hangs=hangs, stopped=out_of_time)

    def _processor_seconds(self) -> float:
        """Return the time of the processor that the child has used; 0 where that is not told."""
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii")
        except OSError:
            return 0.0
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _sum_up(
        self, summary: Summary, status: int, current: int | None, *, hangs: bool, stopped: bool
    ) -> int:
        reached = self._first
        for line in self._results.read_text(encoding="utf-8").splitlines():
            if line.isdigit():
                reached = int(line)
                continue
            try:
                found = json.loads(line)
            except ValueError:  # the line that a kill cut
                continue
            summary.add(found)
            reached = int(found["seed"]) + 1
        if status == 0 or stopped:
            return max(reached, self._first)
        what = "hang" if hangs else f"crash with status {status}"
        said = self._errors.read_text(encoding="utf-8", errors="replace").strip()[-1500:]
        summary.add({"seed": reached, "outcome": what, "finding": f"{what}: {said}"})
        return reached + 1
