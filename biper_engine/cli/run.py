"""`biper run`: classify images with a `.biper` file."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biper_engine.cli.console import print_json, results, status
from biper_engine.cli.engines import ENGINE_HELP, engine_file
from biper_engine.cli.images import (
    Labels,
    Mean,
    Preparation,
    Size,
    Std,
    image_batches,
    preprocessing_of,
)
from biper_engine.cli.sources import Backend

if TYPE_CHECKING:
    from biper_engine import Metadata

__all__ = ["run"]


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=ENGINE_HELP)],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Image files, or directories of them.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes to print per image.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 32,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    labels: Labels = None,
    backend: Backend = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Classify images; one line for each, the likeliest classes first.

    Images are prepared as the .biper file says. What it lacks, or what you
    want otherwise, are --mean, --std, --size and --labels.

    [bold]Examples[/bold]
    biper run digits.biper digits/7_0.png
    biper run digits.biper digits --top 1 --json
    biper run net.biper photos --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --labels names.txt
    """
    import torch

    import biper_engine
    from biper_engine.serving.classifier import require_logits, top_classes
    from biper_engine.serving.inputs import find_images

    with status("Loading"), engine_file(file) as path:
        engine = biper_engine.load(path)
    said = Preparation(mean=mean, std=std, size=size, labels=labels)
    metadata = preprocessing_of(engine, file, said)
    rows: list[dict[str, Any]] = []
    with biper_engine.use_backend(backend) if backend else nullcontext(), torch.inference_mode():
        for paths, tensor in image_batches(find_images(images), metadata, batch):
            logits = engine(tensor)
            require_logits(logits)
            _require_names(labels, metadata, logits.shape[1])
            rows += [
                {"image": str(path), "top": top_classes(values, top, metadata.class_names)}
                for path, values in zip(paths, logits, strict=True)
            ]
    if json_output:
        print_json({"file": str(file), "images": rows})
        return
    console = results()
    for row in rows:
        console.print(_line(row), markup=False, soft_wrap=True)


def _line(row: dict[str, Any]) -> str:
    found = ", ".join(f"{entry['class']} {entry['probability']:.1%}" for entry in row["top"])
    return f"{row['image']}: {found}"


def _require_names(labels: Path | None, metadata: Metadata, classes: int) -> None:
    names = metadata.class_names
    if labels is not None and names is not None and len(names) != classes:
        raise ValueError(
            f"--labels '{labels}' has {len(names)} names, but the network has {classes} classes."
        )
