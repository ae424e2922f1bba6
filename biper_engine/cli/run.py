"""`biper run`: classify images with a `.biper` file."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from biper_engine.cli.console import print_json, results, status
from biper_engine.cli.engines import ENGINE_HELP, engine_file
from biper_engine.cli.images import find_images, image_batches, preprocessing_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["run"]


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=ENGINE_HELP)],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Image files, or directories of them.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes to print per image.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 32,
    backend: Annotated[
        str | None, typer.Option(help="Run on this backend only.", show_default=False)
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Classify images with the preprocessing and the class names of a .biper file.

    [bold]Examples[/bold]
    biper run digits.biper digits/7_0.png
    biper run digits.biper digits --top 1 --json
    """
    import torch

    import biper_engine

    with status("Loading"), engine_file(file) as path:
        engine = biper_engine.load(path)
    metadata = preprocessing_of(engine, file)
    rows: list[dict[str, Any]] = []
    with biper_engine.use_backend(backend) if backend else nullcontext(), torch.inference_mode():
        for paths, tensor in image_batches(find_images(images), metadata, batch):
            logits = engine(tensor)
            _require_logits(logits)
            rows += [
                {"image": str(path), "top": _top(values, top, metadata.class_names)}
                for path, values in zip(paths, logits, strict=True)
            ]
    if json_output:
        print_json({"file": str(file), "images": rows})
        return
    console = results()
    for row in rows:
        console.print(row["image"], style="bold", markup=False, soft_wrap=True)
        console.print(_table(row["top"]))


def _require_logits(logits: Any) -> None:
    import torch

    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(
            f"The network returns {got}, wanted logits [N, classes]. `biper run` is for "
            "classifiers; load other networks with biper_engine.load."
        )


def _top(logits: Tensor, count: int, names: tuple[str, ...] | None) -> list[dict[str, Any]]:
    shares = logits.softmax(0)
    order = logits.argsort(descending=True, stable=True)[:count].tolist()
    known = names if names is not None and len(names) == len(logits) else None
    return [
        {
            "class": known[index] if known else index,
            "index": index,
            "probability": float(shares[index]),
            "logit": float(logits[index]),
        }
        for index in order
    ]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class", overflow="fold", min_width=8)
    table.add_column("softmax", justify="right")
    table.add_column("logit", justify="right")
    for row in rows:
        table.add_row(escape(str(row["class"])), f"{row['probability']:.1%}", f"{row['logit']:.3f}")
    return table
