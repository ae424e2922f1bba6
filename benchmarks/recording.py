"""Recorded results: their folder, the commit at their start, and the choice among several tries."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from biper_engine.files import write_atomically

__all__ = ["RESULTS", "ROOT", "commit", "disturbance", "least_disturbed", "record", "tries_told"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

DISTURBED = 0.05


def commit() -> str:
    """Return the checked-out commit, with a mark if files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def record(values: Mapping[str, Any], path: Path) -> None:
    """Write JSON values to a file, completely or not at all, after the commit."""
    text = json.dumps({"commit": commit(), **values}, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def disturbance(values: Mapping[str, Any]) -> float | None:
    """Return the largest slowdown of a contestant in turn, relative to its time alone.

    Return None if times alone were not measured.
    """
    slower = [
        contest["contestants"][name]["median_ms"] / alone - 1.0
        for contest in values["batches"]
        for name, alone in contest.get("alone_ms", {}).items()
    ]
    return max(slower, default=None)


def least_disturbed(tries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the least disturbed try, and stop at the first that is not disturbed.

    Returns:
        Its values, after the disturbance of each try so far. If the disturbance of the first try
        is not known, that try unchanged.
    """
    found: list[float] = []
    best: dict[str, Any] = {}
    for values in tries:
        slower = disturbance(values)
        if slower is None:
            return values
        found.append(slower)
        if found[-1] == min(found):
            best = values
        if found[-1] <= DISTURBED:
            break
    return {"disturbance_of_tries": found, **best}


def tries_told(values: Mapping[str, Any]) -> list[str]:
    """Return a line for each try in the result of `least_disturbed`."""
    return [
        f"  try {n}: up to {most:.0%} slower in turn than alone"
        for n, most in enumerate(values.get("disturbance_of_tries", ()), 1)
    ]
