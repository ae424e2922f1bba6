"""Arguments of commands that run engines: which file, by a network's name too, and where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["ENGINE_HELP", "RayCluster", "engine_file"]

ENGINE_HELP = "A .biper file, or the name of a trained network, as digits/resnet20_1w1a."

RayCluster = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Ray cluster for them, as auto; without it, this machine.",
        show_default=False,
    ),
]


@contextmanager
def engine_file(file: Path) -> Iterator[Path]:
    """Give the path of a `.biper` file; a file goes before a name."""
    from biper_engine.models import shipped
    from biper_engine.shipped import shipped_file

    name = file.as_posix()
    if not file.exists() and name in shipped():
        with shipped_file(name) as path:
            yield path
        return
    yield file
