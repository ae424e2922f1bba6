"""Record what several training runs came to, side by side.

    python benchmarks/training_runs.py NAME RUN... --machine NAME

Each RUN is the folder of a finished `biper train`; NAME says what they are for, as "digits". Writes

    benchmarks/results/training-NAME-MACHINE.json      recipe, what each run changes in it, results

docs/tables.py makes the tables of docs/results.md from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recording import RESULTS, record

from biper_engine.bench.machine import machine_facts
from biper_engine.training import to_yaml
from biper_engine.training.report import Run, Stage, read_run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", help='what the runs are for, such as "digits"')
    parser.add_argument("runs", nargs="+", type=Path, help="folders that `biper train` wrote")
    parser.add_argument("--machine", required=True, help="name of the machine, for the file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    given = parser.parse_args(arguments)
    runs = [read_run(path) for path in given.runs]
    for run in runs:
        if not run.is_finished:
            parser.error(f"'{run.path}' is {run.state}. Finish it with biper train --resume.")
    path = given.results / f"training-{given.name}-{given.machine}.json"
    record(summary(runs), path)
    print(path)
    return 0


def summary(runs: list[Run]) -> dict[str, Any]:
    """Return all that is recorded: the first run's recipe, and of each run what differs."""
    first = flat(runs[0].config.to_dict())
    return {
        "machine": machine_facts(),
        "versions": runs[0].versions,
        "recipe": to_yaml(runs[0].config),
        "runs": [
            {
                "run": run.path.name,
                "changes": {k: v for k, v in flat(run.config.to_dict()).items() if first[k] != v},
                "stages": [stage_result(stage) for stage in run.stages],
                "engine": run.verified
                and {key: run.verified[key] for key in ("accuracy", "bytes", "verified")},
            }
            for run in runs
        ],
    }


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return settings under their names in a recipe, such as `stage1.lr`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


def stage_result(stage: Stage) -> dict[str, Any]:
    """Return what a stage came to; errors are means over the binary layers, None without any."""
    assert stage.result is not None
    errors = stage.errors.values()
    closed = [one.closed_form for one in errors if one.closed_form is not None]
    return {
        **stage.result.to_dict(),
        "train_loss": stage.metrics[max(stage.metrics)].get("train_loss"),
        "flips_per_weight": stage.flips_per_weight,
        "quantization_error": mean([one.error for one in errors]),
        "quantization_error_official": mean([one.official for one in errors]),
        "quantization_error_closed_form": mean(closed),
    }


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


if __name__ == "__main__":
    sys.exit(main())
