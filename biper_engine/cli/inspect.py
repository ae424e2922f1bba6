"""`biper inspect`: what a file or a network consists of, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biper_engine.cli.console import print_json, results, status
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
    from biper_engine import Engine

__all__ = ["inspect"]


def inspect(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A .biper file, a checkpoint, or module:callable."),
    ],
    arch: Arch = None,
    frequency: Frequency = None,
    stage: Stage = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Show every layer: packed or float and why, its weights, work and bytes.

    A checkpoint or a model is converted in memory to find out; no file is
    written and nothing is checked.

    [bold]Examples[/bold]
    biper inspect digits.biper
    biper inspect biper-train/stage2.pt --json
    biper inspect mynet:build --input 1,3,224,224
    """
    import biper_engine

    wanted = ModelSource(text=source, weights=weights, arch=arch, frequency=frequency, stage=stage)
    path = Path(source)
    if path.suffix == ".biper":
        if (arch, frequency, stage, weights, input_shape) != (None,) * 5:
            raise typer.BadParameter("A .biper file takes no further options: it knows its own.")
        with status("Loading"):
            engine = biper_engine.load(path)
        file_bytes = path.stat().st_size
    else:
        with status("Loading the model"):
            model = load_model(wanted)
            example = example_input(model, input_shape)
        with status("Converting in memory"):
            engine = biper_engine.convert(model, example, unconverted="ignore", check=False)
        file_bytes = None
    facts = _facts(engine, source, file_bytes)
    if json_output:
        print_json({**facts, "report": engine.report.to_dict()})
        return
    console = results()
    for name, value in facts.items():
        if value is not None:
            console.print(f"{name.replace('_', ' ')}: {_text(value)}", markup=False, soft_wrap=True)
    console.print(layer_table(engine.report, sizes=True))
    console.print(_totals(engine), markup=False, soft_wrap=True)


def _facts(engine: Engine, source: str, file_bytes: int | None) -> dict[str, Any]:
    origin, metadata = engine.provenance, engine.metadata
    names = metadata.class_names if metadata is not None else None
    return {
        "source": source,
        "architecture": origin.architecture if origin is not None else None,
        "frequency": origin.frequency if origin is not None else None,
        "stage": origin.stage if origin is not None else None,
        "input": str(engine.signature),
        "float_maps": engine.options.get("compute_dtype"),
        "classes": len(names) if names is not None else None,
        "file_bytes": file_bytes,
        "proof": f"{len(engine.proof.maps)} packed maps and the outputs" if engine.proof else None,
    }


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _totals(engine: Engine) -> str:
    report = engine.report
    return (
        f"{report.packed} of {len(report.layers)} layers packed; MACs on bits "
        f"{report.binary_macs:,}, in float {report.float_macs:,};\n"
        f"tensors {report.bytes_before:,} -> {report.bytes_after:,} bytes"
    )
