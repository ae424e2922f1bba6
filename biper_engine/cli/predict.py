"""`biper predict`: classify many images into Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biper_engine.cli.console import print_json, results, show_note, status, steps
from biper_engine.cli.engines import ENGINE_HELP, RayCluster, engine_file
from biper_engine.cli.images import Labels, Mean, Preparation, Size, Std, preprocessing_of

if TYPE_CHECKING:
    from biper_engine.serving import Predictions

__all__ = ["predict"]


def predict(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=ENGINE_HELP)],
    images: Annotated[
        Path,
        typer.Option(
            "--images",
            "-i",
            metavar="PATH",
            help="Folder of images at any depth, or Parquet: a file or a folder of them.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Folder for results.", show_default=False),
    ],
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 32,
    rows: Annotated[
        int, typer.Option(min=1, help="Images per file of results; Ctrl-C loses no more.")
    ] = 1000,
    logits: Annotated[bool, typer.Option("--logits", help="Write all logits, too.")] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Run N engines in actors of Ray, one processor each.",
            show_default=False,
        ),
    ] = None,
    ray: RayCluster = None,
    image_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of Parquet, if not image.", show_default=False),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of Parquet, if not label.", show_default=False),
    ] = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    labels: Labels = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Classify many images; results are Parquet files.

    The same command goes on with a run that was interrupted. An image that
    cannot be read is a row without a class, with the reason.

    [bold]Examples[/bold]
    biper predict net.biper --images photos --out results
    biper predict net.biper --images photos --out results --workers 8
    biper predict net.biper --images test.parquet --out /shared/results --ray auto
    """
    import biper_engine
    from biper_engine.serving import predict as predict_all

    said = Preparation(mean=mean, std=std, size=size, labels=labels)
    with status("Loading"), engine_file(file) as path:
        metadata = preprocessing_of(biper_engine.load(path), file, said)
    options: dict[str, Any] = {
        **{"metadata": metadata, "batch_size": batch, "rows_per_part": rows, "logits": logits},
        **{"workers": workers, "ray": ray},
        **{"image_column": image_column, "label_column": label_column},
    }
    try:
        with engine_file(file) as path, steps("Images") as progress:
            done = predict_all(path, images, out, progress=progress, **options)
    except KeyboardInterrupt:
        show_note(f"Stopped. The same command goes on with what is in '{out}'.")
        raise typer.Exit(130) from None
    _tell(done, json_output)


def _tell(done: Predictions, json_output: bool) -> None:
    values = {
        **{"out": str(done.out), "images": done.rows, "failed": done.failed},
        "continued": done.continued,
    }
    if json_output:
        print_json(values)
        return
    before = f" ({done.continued:,} by an earlier run)" if done.continued else ""
    text = f"{done.rows:,} images{before}: {done.rows - done.failed:,} classified"
    failed = f", {done.failed:,} without a class; `error` says why" if done.failed else ""
    results().print(f"{text}{failed}.\n{done.out}", markup=False, soft_wrap=True)
