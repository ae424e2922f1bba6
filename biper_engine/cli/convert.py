"""`biper convert`: convert a checkpoint or a model in code to a `.biper` file."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biper_engine.cli.console import command_line, print_json, results, shown_warnings, status
from biper_engine.cli.layers import layer_table
from biper_engine.cli.sources import (
    Arch,
    Frequency,
    InputShape,
    ModelSource,
    Stage,
    Weights,
    example_input,
    load_model,
)

if TYPE_CHECKING:
    from biper_engine import ConversionReport, VerifyReport

__all__ = ["convert", "summary"]


class UnconvertedChoice(StrEnum):
    """What to do about a binary layer that stays float."""

    WARN = "warn"
    RAISE = "raise"
    IGNORE = "ignore"


class ComputeType(StrEnum):
    """Type of the float maps between layers."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Checkpoint (ours or the official code's), module:callable, file.py:callable, "
            "or a trained network's name.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write; by default named after SOURCE.",
            show_default=False,
        ),
    ] = None,
    arch: Arch = None,
    frequency: Frequency = None,
    stage: Stage = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Layers to leave in float, repeatable.", show_default=False
        ),
    ] = None,
    unconverted: Annotated[
        UnconvertedChoice, typer.Option(help="Binary layers that stay float.")
    ] = UnconvertedChoice.WARN,
    dtype: Annotated[
        ComputeType,
        typer.Option(metavar="TYPE", help="Float maps: float32 (exact), float16, bfloat16."),
    ] = ComputeType.FLOAT32,
    check: Annotated[bool, typer.Option(help="Compare with the model before writing.")] = True,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every layer.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Convert a binary network into a .biper file of packed bits.

    The layers are recognised by what they compute; the code needs no change.

    [bold]Examples[/bold]
    biper convert biper-train/stage2.pt
    biper convert model_best.pth.tar --frequency 20 --stage 2
    biper convert mynet.py:build --weights mynet.pt --input 1,3,224,224 -v
    """
    import torch

    from biper_engine.conversion import convert_and_verify

    wanted = ModelSource(text=source, weights=weights, arch=arch, frequency=frequency, stage=stage)
    target = output or _default_output(wanted)
    if not target.parent.is_dir():
        raise ValueError(f"Cannot write '{target}': there is no directory '{target.parent}'.")
    with status("Loading the model"):
        model = load_model(wanted)
        example = example_input(model, input_shape)
    with status("Converting"), shown_warnings():
        engine, verified = convert_and_verify(
            model,
            example,
            keep_float=keep_float or (),
            unconverted=unconverted.value,
            compute_dtype=getattr(torch, dtype.value),
            check=check,
        )
    with status(f"Writing {target}"):
        engine.save(target)

    following = command_line("verify", target)
    line = summary(engine.report, target.stat().st_size, verified)
    if json_output:
        print_json(
            {
                "file": str(target),
                "file_bytes": target.stat().st_size,
                "packed": engine.report.packed,
                "layers": len(engine.report.layers),
                "report": engine.report.to_dict(),
                "verify": json.loads(verified.to_json()) if verified else None,
                "next": following,
            }
        )
    elif verbose:
        results().print(layer_table(engine.report))
    console = results(json_output=json_output)
    console.print(f"{line}; next: {following}", soft_wrap=True, markup=False)


def _default_output(source: ModelSource) -> Path:
    if source.reference is None:
        path = Path(source.text)
        path = path if path.exists() else Path(path.name)  # the name of a trained network
        return path.with_name(path.name.split(".")[0] + ".biper")
    return Path(source.reference[1] + ".biper")


def summary(report: ConversionReport, file_bytes: int, verified: VerifyReport | None) -> str:
    """Return a summary of the conversion in one line."""
    sizes = f"packed {report.packed}/{len(report.layers)} layers, "
    sizes += f"{report.bytes_before:,} -> {file_bytes:,} bytes"
    if verified is None:
        return f"{sizes}, not compared with the model"
    return (
        f"{sizes}, {verified.layers_equal}/{verified.layers} layers equal; "
        f"end to end {verified.end_to_end}"
    )
