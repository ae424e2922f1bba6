"""Results as lines of JSON; each is on disk before the next work begins."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"


def append(kind: str, **values: Any) -> None:
    """Add a line to the results in the folder `OUT`; a later kill does not lose it.

    Several processes may do this at once, and one may have been killed while it wrote its line.
    """
    data = json.dumps({"kind": kind, **values}).encode() + b"\n"
    with Path(os.environ["OUT"], RESULTS).open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            data = (b"" if file.read(1) == b"\n" else b"\n") + data
        file.write(data)
        os.fsync(file.fileno())


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the last check in a folder, without a truncated line."""
    found: list[dict[str, Any]] = []
    path = folder / RESULTS
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            values = json.loads(text)
        except ValueError:  # its writer was killed
            continue
        if values["kind"] == "run":
            found.clear()
        found.append(values)
    return found


@dataclass
class FileResults:
    """Results of the tests of a file; `whose` are the backend and the checking tool.

    `failed` has names, `skipped` reasons, `problem` the reason if the file did not end well.
    """

    file: str
    whose: tuple[str, str]
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    problem: str = "stopped before its end"


def file_results(lines: Iterable[Mapping[str, Any]]) -> list[FileResults]:
    """Return the results of each file of tests, from its last lines."""
    found: dict[tuple[str, ...], FileResults] = {}
    for line in (line for line in lines if line["kind"] == "tests"):
        whose = (line["backend"], line["under"])
        one = found.setdefault((line["file"], *whose), FileResults(line["file"], whose))
        if "problem" in line:
            one.problem = line["problem"]
            continue
        one.passed, one.failed, one.skipped = line["passed"], line["failed"], line["skipped"]
        if line["done"]:
            one.problem = ""
    return list(found.values())
