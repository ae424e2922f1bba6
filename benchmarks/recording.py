"""Where recorded results lie, and what each has in front: the commit that was measured."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "ROOT", "commit", "record"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def commit() -> str:
    """Return the commit that is checked out, marked where files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def record(values: Mapping[str, Any], path: Path) -> None:
    """Write JSON values to a file, the commit in front."""
    text = json.dumps({"commit": commit(), **values}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
