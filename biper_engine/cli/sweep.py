"""`biper train --sweep`: one run after the other, and a table of what came of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from biper_engine.cli.console import command_line, print_json, results, show_error
from biper_engine.errors import NotFiniteError

if TYPE_CHECKING:
    from biper_engine.training import TrainingConfig

__all__ = ["run_sweep", "show_sweep"]


def run_sweep(
    runs: Mapping[str, TrainingConfig],
    output: Path,
    train: Callable[[TrainingConfig, Path], object],
    *,
    resume: bool,
    convert: bool,
) -> dict[str, str]:
    """Train every run in a folder of its own; finished ones are left as they are.

    A run whose loss became infinite or NaN does not keep the others from being trained.

    Args:
        runs: settings by name.
        output: with a folder for each name.
        train: trains one run in its folder.
        resume: go on with runs that were begun.
        convert: a run is finished only with its `.biper` file.

    Returns:
        For each name why it has no result, or an empty text.
    """
    from biper_engine.models.registry import architecture
    from biper_engine.training import is_first_process
    from biper_engine.training.directory import check_claim

    if (output / "config.json").exists():
        raise FileExistsError(
            f"'{output}' holds a training run, not a sweep. Pass another --output for the sweep."
        )
    for name, config in runs.items():  # before the first of them takes its hours
        check_claim(output / name, config, resume=resume)
    problems = {}
    for number, (name, config) in enumerate(runs.items(), start=1):
        binary = architecture(config.architecture).is_binary
        done = _is_done(output / name, convert and binary)
        if is_first_process():
            text = f"run {number} of {len(runs)}: {name}{', finished before' if done else ''}"
            results(json_output=True).print(text, markup=False)
        problems[name] = "" if done else _trained(train, config, output / name)
    return problems


def _is_done(path: Path, convert: bool) -> bool:
    from biper_engine.training.report import is_run, read_run

    if not is_run(path):
        return False
    run = read_run(path)
    return run.is_finished and (run.file_is_verified or not convert)


def _trained(
    train: Callable[[TrainingConfig, Path], object], config: TrainingConfig, path: Path
) -> str:
    try:
        train(config, path)
    except NotFiniteError as error:
        show_error(error)
        return str(error)
    return ""


def show_sweep(problems: Mapping[str, str], output: Path, json_output: bool) -> None:
    """Print a table of the runs; exit code 1 if one of them has no result."""
    from biper_engine.training.report import Comparison, read_run

    compared = Comparison([read_run(output / name) for name in problems])
    following = command_line("report", output)
    if json_output:
        print_json({"runs": _values(compared, problems), "next": following})
    else:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in compared.columns:
            table.add_column(name, justify="right", overflow="fold")
        for row, problem in zip(compared.rows, problems.values(), strict=True):
            table.add_row(*row[:-1], "loss not finite" if problem else row[-1])
        console = results()
        console.print(table)
        console.print(f"next: {following}", soft_wrap=True, markup=False)
    if any(problems.values()):
        raise typer.Exit(1)


def _values(compared: Any, problems: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {"name": name, "path": str(run.path), **values, "problem": problem or None}
        for (name, problem), run, values in zip(
            problems.items(), compared.runs, compared.values, strict=True
        )
    ]
