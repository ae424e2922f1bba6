"""Record what several training runs came to, side by side.

    python benchmarks/training_runs.py NAME RUN... --machine NAME [--add]

Each RUN is the folder of a finished `biper train`; NAME says what they are for, as "digits". Writes

    benchmarks/results/training-NAME-MACHINE.json      recipe, what each run changes in it, results

With --add, the runs of an existing record stay, before the new ones.

docs/tables.py makes the tables of docs/results.md from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recording import RESULTS, record

from biper_engine.bench.machine import machine_facts
from biper_engine.training import to_yaml
from biper_engine.training.recipe import yaml_value
from biper_engine.training.report import Run, Stage, read_run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", help='what the runs are for, such as "digits"')
    parser.add_argument("runs", nargs="+", type=Path, help="folders that `biper train` wrote")
    parser.add_argument("--machine", required=True, help="name of the machine, for the file")
    parser.add_argument("--add", action="store_true", help="keep the runs that the record has")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    given = parser.parse_args(arguments)
    runs = [read_run(path) for path in given.runs]
    for run in runs:
        if not run.is_finished:
            parser.error(f"'{run.path}' is {run.state}. Finish it with biper train --resume.")
    path = given.results / f"training-{given.name}-{given.machine}.json"
    values = json.loads(path.read_text(encoding="utf-8")) if given.add else start(runs[0])
    values["runs"] += [result(run, values) for run in runs]
    record(values, path)
    print(path)
    return 0


def start(run: Run) -> dict[str, Any]:
    """Return a record without runs, of the recipe of this one."""
    return {
        "machine": machine_facts(),
        "versions": run.versions,
        "recipe": to_yaml(run.config),
        "runs": [],
    }


def result(run: Run, values: dict[str, Any]) -> dict[str, Any]:
    """Return what is recorded of a run: what differs from the recipe, and what it came to."""
    recipe = settings(values["recipe"])
    changes = {key: v for key, v in settings(to_yaml(run.config)).items() if recipe[key] != v}
    return {
        "run": run.path.name,
        **({} if run.versions == values["versions"] else {"versions": run.versions}),
        "changes": changes,
        "stages": [stage_result(stage) for stage in run.stages],
        "engine": run.verified
        and {key: run.verified[key] for key in ("accuracy", "bytes", "verified")},
    }


def settings(recipe: str) -> dict[str, Any]:
    """Return the settings of a recipe under names such as `stage1.lr`."""
    return flat(yaml_value(recipe, "The recipe"))


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names."""
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
