"""`biper verify`: a `.biper` file against the reference and its own proof, or against its model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biper_engine.cli.console import print_json, results, status
from biper_engine.cli.engines import ENGINE_HELP, engine_file
from biper_engine.cli.images import image_batches, preprocessing_of
from biper_engine.cli.sources import (
    Arch,
    Backend,
    Frequency,
    ModelSource,
    Stage,
    Weights,
    load_model,
)

if TYPE_CHECKING:
    from torch import Tensor

    from biper_engine import Engine
    from biper_engine.serialization import BackendReport, ProofReport

__all__ = ["verify"]

_BATCH = 32
_RANDOM_BATCHES = 4  # of two images


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=ENGINE_HELP)],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Checkpoint or module:callable to compare with.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Images for --against, found recursively.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Compare at most this many images.", show_default=False),
    ] = None,
    backend: Backend = None,
    arch: Arch = None,
    frequency: Frequency = None,
    stage: Stage = None,
    weights: Weights = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every layer.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Prove that a .biper file computes what it should; exit code 0 only if it does.

    Without --against, no model is needed: each operator is compared with the
    reference, the proof stored in the file is replayed, and its native program
    for C is compared with the graph's. With --against,
    every layer is compared with the model that the file was made from, on
    your images, or on random inputs if you pass none.

    [bold]Examples[/bold]
    biper verify digits.biper
    biper verify digits.biper --against stage2.pt --images digits --limit 100
    biper verify twoinputs.biper --against mynet:build --weights mynet.pt
    """
    import biper_engine
    from biper_engine.runtime import program_section
    from biper_engine.serialization import check_program

    source = None
    if against is not None:
        if images is None and limit is not None:
            raise typer.BadParameter("--limit is for --images.")
        source = ModelSource(
            text=against, weights=weights, arch=arch, frequency=frequency, stage=stage
        )
    elif any(value is not None for value in (images, limit, arch, frequency, stage, weights)):
        raise typer.BadParameter(
            "--images, --limit, --arch, --frequency, --stage and --weights are for --against."
        )
    with status("Loading"), engine_file(file) as path:
        engine = biper_engine.load(path)
        program = None if source is not None else check_program(path, program_section)
    if source is None:
        ok = _alone(engine, file, program, backend, verbose, json_output)
    else:
        with biper_engine.use_backend(backend) if backend else nullcontext():
            ok = _against(engine, file, source, images, limit, verbose, json_output)
    if not ok:
        raise typer.Exit(1)


def _alone(
    engine: Engine,
    file: Path,
    program: bool | None,
    backend: str | None,
    verbose: bool,
    json_output: bool,
) -> bool:
    from biper_engine.serialization import check_backend, replay

    with status("Comparing each operator with the reference"):
        operators = check_backend(engine.network, backend)
    with status("Replaying the proof"):
        proof = replay(engine.network, backend=backend)
    ok = operators.ok and proof.ok and program is not False
    if json_output:
        print_json(
            {
                "file": str(file),
                "ok": ok,
                "operators": operators.to_dict(),
                "proof": proof.to_dict(),
                "program": program,
            }
        )
        return ok
    console = results()
    if verbose:
        console.print(operators.table(), markup=False, soft_wrap=True)
        console.print(proof.table(), markup=False, soft_wrap=True)
    verdict = _verdict(operators, proof)
    if program is False:
        verdict += (
            "; but its native program, for C, is NOT what this version makes of its graph: save it "
            "again"
        )
    console.print(f"{file}: {verdict}", markup=False, soft_wrap=True, style="" if ok else "red")
    return ok


def _verdict(operators: BackendReport, proof: ProofReport) -> str:
    if operators.ok and proof.bit_identical:
        if not operators.nodes:
            return "no layer runs on bits; the proof's outputs are as recorded, bit by bit"
        ran = ", ".join(sorted({node.backend for node in operators.nodes}))
        return (
            f"bit-identical on backend {ran}: {len(operators.nodes)} of {len(operators.nodes)} "
            f"operators equal the reference; the proof's {proof.maps} packed maps and its outputs "
            "are as recorded"
        )
    difference = proof.max_output_difference
    logits = "" if difference is None else f"; the logits differ by up to {difference:.3g}"
    first = operators.first_different
    if first is not None:
        return (
            f"NOT identical: {first.node} ({first.op} on {first.backend}) differs first, in "
            f"{first.different:,} of {first.total:,} elements{logits}"
        )
    if not proof.maps_identical:
        bits = "" if proof.bits_differ is None else f", in {proof.bits_differ:,} bits"
        cause = (
            "; the reference differs there, too: float layers round differently on this machine"
            if proof.reference_agrees is False
            else ""
        )
        return f"NOT as recorded: {proof.node} differs first{bits}{logits}{cause}"
    kind = "within rounding" if proof.ok else "NOT as recorded"
    return f"every packed map is bit-identical; the outputs are {kind}{logits}"


def _against(
    engine: Engine,
    file: Path,
    source: ModelSource,
    images: Path | None,
    limit: int | None,
    verbose: bool,
    json_output: bool,
) -> bool:
    import biper_engine
    from biper_engine.serving.inputs import find_images

    if images is None:
        batches: Iterable[Any] = _random_batches(engine)
    else:
        if len(engine.signature.inputs) != 1:
            raise ValueError(
                f"'{file}' takes {len(engine.signature.inputs)} tensors ({engine.signature}), so "
                "images do not fit it; leave out --images to compare on random inputs."
            )
        metadata = preprocessing_of(engine, file)
        paths = find_images([images])[:limit]
        batches = (batch for _, batch in image_batches(paths, metadata, _BATCH))
    with status("Loading the model"):
        model = load_model(source)
    report = biper_engine.verify(engine, model, batches)
    if json_output:
        values = {"file": str(file), "against": source.text, **json.loads(report.to_json())}
        print_json({**values, "layers": report.layers, "layers_equal": report.layers_equal})
        return report.ok
    console = results()
    text = report.table() if verbose or not report.ok else report.summary()
    if images is None:
        takes_images = engine.metadata is not None and engine.metadata.input_size is not None
        advice = "; pass --images DIR to compare on images." if takes_images else "."
        text += f"\nCompared on random inputs{advice}"
    for line in text.splitlines():
        console.print(line, markup=False, soft_wrap=True, style="" if report.ok else "red")
    return report.ok


def _random_batches(engine: Engine) -> list[tuple[Tensor, ...]]:
    """Return inputs like those of a proof, from several seeds."""
    from biper_engine.serialization import example_inputs

    specs = engine.signature.inputs
    return [tuple(example_inputs(specs, seed)) for seed in range(_RANDOM_BATCHES)]
