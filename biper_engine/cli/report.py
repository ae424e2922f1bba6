"""`biper report`: a training run, or several, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biper_engine.cli.console import print_json, results, status

__all__ = ["report"]


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The folder of a training run, or a folder of such folders."
        ),
    ] = Path("biper-train"),
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="HTML file; by default RUN/report.html.", show_default=False
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Write a page about a training run, finished or not: one file, to be opened offline.

    It shows the recipe, loss, accuracy and learning rate, quantization errors
    beside their closed form, sign flips, histograms of the weights' waves,
    confusions, wrong images, and whether the .biper file is verified. Of the
    runs of a sweep, it makes a comparison.

    [bold]Examples[/bold]
    biper report biper-train
    biper report sweep -o sweep.html
    """
    from biper_engine.training import write_report

    with status("Drawing"):
        path = write_report(folder, output)
    if json_output:
        print_json({"path": str(path), "bytes": path.stat().st_size})
        return
    results().print(f"{path} ({path.stat().st_size:,} bytes)", soft_wrap=True, markup=False)
