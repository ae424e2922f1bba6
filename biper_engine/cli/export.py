"""`biper export`: a `.biper` file as a file of another program."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from biper_engine.cli.console import print_json, results, status
from biper_engine.cli.engines import ENGINE_HELP, engine_file

__all__ = ["export"]


class Format(StrEnum):
    """Formats of other programs."""

    ONNX = "onnx"
    QONNX = "qonnx"
    OPENVINO = "openvino"
    AOTI = "aoti"


_SUFFIXES = {
    Format.ONNX: ".onnx",
    Format.QONNX: ".qonnx.onnx",
    Format.OPENVINO: ".xml",
    Format.AOTI: ".pt2",
}


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=ENGINE_HELP)],
    format: Annotated[
        Format | None,
        typer.Option(
            help="Format to write; by default that of --output's name, or onnx.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write; by default beside FILE.", show_default=False
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Batch size of an OpenVINO file (1); free in the others.",
            show_default=False,
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Write a .biper file for another program, checked against the engine.

    onnx: standard operators, binary layers as floats of -1 and 1.
    qonnx: the same with QONNX's BipolarQuant.
    openvino: NAME.xml and NAME.bin, binary layers as BinaryConvolution.
    aoti: a package that PyTorch loads (AOTInductor), binary layers on bits.

    The file is written only if the program's answers agree, where it is
    installed; what differs is printed.

    [bold]Examples[/bold]
    biper export digits.biper
    biper export digits.biper --format openvino --batch 8
    biper export digits.biper -o digits.pt2 --json
    """
    import biper_engine

    if output is None:
        format = format or Format.ONNX
        beside = file if file.exists() else Path(file.name)  # a network's name has no folder
        output = beside.with_name(beside.stem + _SUFFIXES[format])
    with status("Loading"), engine_file(file) as path:
        engine = biper_engine.load(path)
    with status(f"Writing {output}"):
        report = engine.export(output, None if format is None else format.value, batch=batch)
    if json_output:
        print_json({"file": str(file), **report.to_dict()})
        return
    results().print(str(report), markup=False, soft_wrap=True)
