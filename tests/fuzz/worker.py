"""Runs a range of seeds in its own process, and writes a line of JSON for each.

    python -m tests.fuzz.worker FIRST LAST FOLDER RESULTS [EXTENSION]

The number of a seed is written before the seed is loaded, so that the parent knows which one ended
the process. EXTENSION is a build of biper_engine._cpu to use instead of the installed one.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.cases import Cases
from tests.fuzz.judge import judge

_MEMORY = 12 << 30


def main(first: int, last: int, folder: Path, results: Path, extension: str | None) -> None:
    """Run the seeds [first, last)."""
    if extension is None:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    else:
        from tests.native.builds import import_from

        sys.modules["biper_engine._cpu"] = import_from(Path(extension), "biper_engine._cpu")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = Cases(folder)
    path = results.with_suffix(".biper")
    with results.open("a", buffering=1, encoding="utf-8") as lines:
        for seed in range(first, last):
            lines.write(f"{seed}\n")
            start = time.perf_counter()
            found = run(cases, seed, path)
            found |= {"seed": seed, "seconds": round(time.perf_counter() - start, 3)}
            lines.write(json.dumps(found) + "\n")
    path.unlink(missing_ok=True)


def run(cases: Cases, seed: int, path: Path) -> dict[str, Any]:
    """Return what happened to the file of a seed."""
    case = cases[seed]
    about: dict[str, Any] = {"base": case.base, "mutations": case.mutations}
    if case.data is None:
        return {**about, "outcome": "inexpressible"}
    path.write_bytes(case.data)
    try:
        return {**about, **judge(path)}
    except Exception as error:  # a finding, whatever it is
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        said = f"{type(error).__name__}: {str(error)[:300]} ({where})"
        return {**about, "outcome": "error", "finding": said}


if __name__ == "__main__":
    numbers = (int(sys.argv[1]), int(sys.argv[2]))
    main(*numbers, Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5] if len(sys.argv) > 5 else None)
