"""What still fits into a step's time: done in the order of importance, the rest skipped aloud."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic

__all__ = ["Deadline", "Job", "do"]

_CLOSING_S = 3.0


class Deadline:
    """A time that comes.

    Args:
        seconds: until then.
        now: the clock.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = monotonic) -> None:
        self._now, self._end = now, now() + seconds

    @classmethod
    def of_step(cls, default_s: float) -> Deadline:
        """Take the limit of the step that runs, less what it needs to write its values."""
        return cls(float(os.environ.get("STEP_LIMIT_S", default_s)) - _CLOSING_S)

    def left_s(self) -> float:
        return self._end - self._now()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A part of a step.

    Attributes:
        name: for people.
        needs_s: seconds below which it is not begun.
        run: does it.
    """

    name: str
    needs_s: float
    run: Callable[[], None]


def do(
    jobs: Iterable[Job], deadline: Deadline, *, tell: Callable[[str], None] = print
) -> dict[str, str]:
    """Do jobs in their order; one for which too little time is left is skipped, the next tried.

    Returns:
        Why jobs were skipped, by name.
    """
    skipped = {}
    for job in jobs:
        left = deadline.left_s()
        if left < job.needs_s:
            skipped[job.name] = f"needs {job.needs_s:.0f} s, {max(left, 0):.0f} s were left"
            tell(f"SKIPPED {job.name}: {skipped[job.name]}")
            continue
        job.run()
    return skipped
