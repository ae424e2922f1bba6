"""Steps that run one after another or side by side, each in processes with a limit of its own.

Nothing here needs more than Python: a machine that lacks torch is told so by the steps.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

__all__ = ["SKIPPED", "Group", "Outcome", "Step", "last_line", "limits", "python", "run_stage"]

SKIPPED = 3
"""Exit status of a step that has nothing to do here, and said why in its last line."""

_GRACE_S = 5.0
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Step:
    """One part of the check.

    Attributes:
        name: as STEPS and the log have it.
        command: what runs.
        limit_s: seconds after which it is stopped, and failed.
        reserve_s: seconds that steps before it leave to it.
        environment: variables to set for it.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    reserve_s: float
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a step: OK, SKIPPED or FAILED, in how many seconds, and what it said last."""

    name: str
    verdict: str
    seconds: float
    told: str

    def __str__(self) -> str:
        return f"{self.name:<10} {self.verdict:<8}{self.seconds:6.1f} s  {self.told}"


class Group:
    """A command in a session of its own, so that a signal reaches whatever it starts.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self._stopped = False

    def status(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> int | None:
        """Return the exit status, or None where it still runs after that time."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(max(seconds, 0.0))
        return None

    def stop(self) -> None:
        """End what is left of the session: asked first, then by force."""
        if self._stopped:
            return
        self._stopped = True
        if self.status() is None:
            self._signal(signal.SIGTERM)
            self.wait(_GRACE_S)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):  # all of them are gone already
            os.killpg(self._process.pid, number)


def limits(stages: Sequence[Sequence[Step]], left_s: float) -> list[float]:
    """Return how long each step of the first stage may take.

    Args:
        stages: that stage and all that come behind it. Their reserves are left to them, but never
            more than three quarters of the time.
        left_s: seconds until the budget is spent.

    Returns:
        A number for each step, 0 where nothing is left.
    """
    now, *later = stages
    reserved = sum(max(step.reserve_s for step in stage) for stage in later)
    free = max(left_s - reserved, left_s / 4 if later else left_s, 0.0)
    return [min(step.limit_s, free) for step in now]


def run_stage(
    stage: Sequence[Step],
    allowed_s: Sequence[float],
    folder: Path,
    *,
    tell: Callable[[Outcome], None],
) -> list[Outcome]:
    """Run the steps of a stage side by side, each at most its seconds.

    What a step prints goes to `folder`/NAME.log. STEP_LIMIT_S tells it how long it may take. One
    that takes longer is stopped, with everything that it started.

    Args:
        stage: the steps.
        allowed_s: seconds for each.
        folder: of the logs; it exists.
        tell: takes what became of a step as soon as it has ended.
    """
    running = [
        _Running(step, seconds, folder / f"{step.name}.log")
        for step, seconds in zip(stage, allowed_s, strict=True)
    ]
    done: dict[str, Outcome] = {}
    try:
        while len(done) < len(running):
            for one in running:
                outcome = None if one.step.name in done else one.outcome()
                if outcome is not None:
                    done[one.step.name] = outcome
                    tell(outcome)
            sleep(_POLL_S)
    finally:
        for one in running:
            one.stop()
    return [done[step.name] for step in stage]


class _Running:
    """A step under way, or why it is not."""

    def __init__(self, step: Step, seconds: float, log: Path) -> None:
        self.step, self._seconds, self._log = step, seconds, log
        self._start = monotonic()
        self._group: Group | None = None
        log.write_bytes(b"")
        if seconds <= 0:
            log.write_text(f"the budget leaves no time for it; its limit is {step.limit_s:.0f} s\n")
            return
        environment = {**step.environment, "STEP_LIMIT_S": f"{seconds:.1f}"}
        try:
            self._group = Group(step.command, log, environment)
        except OSError as error:
            log.write_text(f"it cannot be started: {error}\n", encoding="utf-8")

    def outcome(self) -> Outcome | None:
        """Return how it ended, or None while it runs; one that is late is stopped."""
        status = None if self._group is None else self._group.status()
        late = monotonic() - self._start >= self._seconds
        if self._group is not None and status is None and not late:
            return None
        self.stop()  # also what it left behind
        told, verdict = last_line(self._log), "FAILED"
        if self._group is not None and status is None:
            told = f"stopped at its limit of {self._seconds:.0f} s; {told}"
        elif status is not None and status < 0:
            told = f"ended by signal {-status}; {told}"
        elif status is not None:
            verdict = {0: "OK", SKIPPED: "SKIPPED"}.get(status, verdict)
        return Outcome(self.step.name, verdict, monotonic() - self._start, told)

    def stop(self) -> None:
        if self._group is not None:
            self._group.stop()


def last_line(log: Path) -> str:
    """Return the last line of a file that is not empty, or that there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it printed nothing"


def python(*words: str) -> list[str]:
    """Return a command for this very Python, which prints what it has at once."""
    return [sys.executable, "-u", *words]
