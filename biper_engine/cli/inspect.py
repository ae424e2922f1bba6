"""`biper inspect`: show the contents of a file or a network, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biper_engine.cli.console import print_json, results, status
from biper_engine.cli.engines import engine_file
from biper_engine.cli.layers import float_reasons, layer_table
from biper_engine.cli.sources import (
    Arch,
    Frequency,
    InputShape,
    ModelSource,
    Stage,
    Weights,
    example_input,
    find_model,
)

if TYPE_CHECKING:
    from biper_engine import Engine, Metadata

__all__ = ["inspect"]

_FILE_FACTS = ("format", "file_bytes", "proof")


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A .biper file, a checkpoint, module:callable, or the name of a network; "
            "digits/resnet20_1w1a is trained.",
        ),
    ],
    arch: Arch = None,
    frequency: Frequency = None,
    stage: Stage = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Show every layer: packed or float and why, its weights, work and bytes.

    Anything other than a .biper file is converted in memory first; no file is
    written and nothing is checked.

    [bold]Examples[/bold]
    biper inspect digits.biper
    biper inspect biper-train/stage2.pt --json
    biper inspect mynet:build --input 1,3,224,224
    biper inspect cifar10/resnet18_1w1a
    """
    wanted = ModelSource(text=source, weights=weights, arch=arch, frequency=frequency, stage=stage)
    with engine_file(Path(source)) as path:
        if path.suffix != ".biper":
            engine, file_facts = _convert(wanted, input_shape), dict.fromkeys(_FILE_FACTS)
        elif wanted != ModelSource(text=source) or input_shape:
            raise typer.BadParameter("A .biper file takes no further options.")
        else:
            engine, file_facts = _load(path)
    facts = {"source": source, **file_facts, **_facts(engine)}
    if json_output:
        metadata = engine.metadata.to_dict() if engine.metadata is not None else None
        print_json({**facts, "metadata": metadata, "report": engine.report.to_dict()})
        return
    console = results()
    for name, value in facts.items():
        if value is not None:
            console.print(f"{name.replace('_', ' ')}: {_text(value)}", markup=False)
    console.print(layer_table(engine.report, sizes=True))
    for line in [*float_reasons(engine.report), _totals(engine)]:
        console.print(line, markup=False)


def _load(path: Path) -> tuple[Engine, dict[str, Any]]:
    """Return the engine in a file, and facts about the file."""
    import biper_engine
    from biper_engine.serialization.container import read

    with status("Loading"):
        engine = biper_engine.load(path)
        header, _ = read(path)
    assert engine.proof is not None, "every file has one"
    proof = f"{len(engine.proof.maps)} packed maps and the outputs"
    values = (header["format"], path.stat().st_size, proof)
    return engine, dict(zip(_FILE_FACTS, values, strict=True))


def _convert(source: ModelSource, input_shape: Sequence[str] | None) -> Engine:
    import biper_engine

    with status("Loading the model"):
        model = find_model(source)
        example = example_input(model, input_shape)
    with status("Converting in memory"):
        return biper_engine.convert(model, example, unconverted="ignore", check=False)


def _facts(engine: Engine) -> dict[str, Any]:
    origin, metadata = engine.provenance, engine.metadata
    names = metadata.class_names if metadata is not None else None
    return {
        "architecture": origin.architecture if origin is not None else None,
        "frequency": origin.frequency if origin is not None else None,
        "stage": origin.stage if origin is not None else None,
        "licence": origin.licence if origin is not None else None,
        "input": str(engine.signature),
        "float_maps": engine.options.get("compute_dtype"),
        "runs_here": engine.execution,
        "images": _preprocessing(metadata) if metadata is not None else None,
        "classes": len(names) if names is not None else None,
    }


def _preprocessing(metadata: Metadata) -> str:
    """Return how images are prepared, in one line."""
    size = metadata.input_size
    shape = "x".join(map(str, size)) if size is not None else "of any size"
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (metadata.mean, metadata.std))
    return (
        f"{shape}, {metadata.interpolation}, centre crop {metadata.crop_pct:g}, "
        f"mean {mean}, std {std}"
    )


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _totals(engine: Engine) -> str:
    report = engine.report
    return (
        f"{report.packed} of {len(report.layers)} layers packed; MACs on bits "
        f"{report.binary_macs:,}, in float {report.float_macs:,};\n"
        f"tensors {report.bytes_before:,} -> {report.bytes_after:,} bytes"
    )
