"""`biper bench`: compare an engine with its float network, and with other ways to deploy."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biper_engine.cli.bench_tables import bench_notes, bench_table, stream_notes, stream_table
from biper_engine.cli.console import print_json, results, status
from biper_engine.cli.contestants import Contestants, contestants, random_images
from biper_engine.cli.sources import (
    Arch,
    Backend,
    Frequency,
    InputShape,
    ModelSource,
    Stage,
    Weights,
)

if TYPE_CHECKING:
    from rich.table import Table

    from biper_engine.bench import Budget

__all__ = ["bench"]


def bench(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A .biper file, checkpoint, module:callable or name."
        ),
    ],
    batch: Annotated[
        list[int] | None,
        typer.Option(
            "--batch",
            "-b",
            min=1,
            metavar="N",
            help="Images per call, repeatable (1, 64).",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Threads of each (torch's).", show_default=False),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="S",
            help="Seconds per batch size (5 to 60).",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Calls of each, not --seconds.",
            show_default=False,
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also time torch.compile.")
    ] = True,
    rivals: Annotated[
        bool,
        typer.Option("--rivals", help="Also time ONNX Runtime, OpenVINO."),
    ] = False,
    streams: Annotated[
        bool,
        typer.Option("--streams", help="Images per second, calls at once."),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="The model of a .biper file.", show_default=False),
    ] = None,
    backend: Backend = None,
    profile: Annotated[bool, typer.Option("--profile", help="Time every layer, too.")] = False,
    arch: Arch = None,
    frequency: Frequency = None,
    stage: Stage = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Compare the speed of an engine and its float network, eager and compiled.

    Answers are checked first; then all are called in turn. A network's name takes
    random weights. benchmarks/README.md says what --rivals and --streams run.

    [bold]Examples[/bold]
    biper bench digits.biper --against biper-train/stage2.pt
    biper bench cifar10/vgg_small_1w1a --threads 1 --no-compile --profile
    biper bench imagenet/resnet18_1w1a --rivals --batch 1 --batch 8
    """
    import biper_engine
    from biper_engine.bench import common_threads, torch_threads

    if streams and (rivals or profile):
        raise typer.BadParameter(
            "--streams counts images per second and has its own rivals; leave out --rivals and "
            "--profile, which time single calls."
        )
    try:
        threads = common_threads(threads)
        common_threads(1 if streams else None)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    wanted = ModelSource(text=source, weights=weights, arch=arch, frequency=frequency, stage=stage)
    budget = _budget(seconds, rounds, rivals=rivals, streams=streams)
    with (
        biper_engine.use_backend(backend) if backend else nullcontext(),
        torch_threads(threads),
    ):
        pair = contestants(wanted, against, input_shape)
        if streams:
            found = _streams(pair, batch or [1], budget, callers=threads)
        else:
            found = _calls(
                *(pair, batch or [1, 64], budget),
                threads=threads,
                compiled=compiled,
                rivals=rivals,
                profile=profile,
            )
    if json_output:
        print_json({"source": source, "checked": pair.checked, **found.values})
        return
    console = results()
    console.print(found.table)
    for text in (pair.checked, *found.notes):
        console.print(text, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Found:
    """The measurements to print: as JSON values, or as a table with notes."""

    values: dict[str, Any]
    table: Table
    notes: list[str]


def _calls(
    pair: Contestants,
    batch: list[int],
    budget: Budget,
    *,
    threads: int,
    compiled: bool,
    rivals: bool,
    profile: bool,
) -> _Found:
    """Time single calls."""
    from biper_engine.bench import ENGINE, compare

    slow = [name for name, on in (("torch.compile", compiled), ("rivals", rivals)) if on]
    takes = "take" if rivals else "takes"
    waiting = (
        f"Timing all in turn; {' and '.join(slow)} {takes} a while first" if slow else "Timing"
    )
    batches = [random_images(pair.engine, count) for count in batch]
    with status(waiting):
        comparison = compare(
            *(pair.engine, pair.model, batches),
            threads=threads,
            compiled=compiled,
            deployed=rivals,
            budget=budget,
        )
    with status("Timing every layer"):
        profiles = [
            pair.engine.profile(images, rounds=_rounds(contest.samples[ENGINE].median_ms, budget))
            for images, contest in zip(batches, comparison.contests, strict=True)
            if profile
        ]
    ran = _backends(pair)
    return _Found(
        {
            "engine_backends": ran,
            **comparison.to_dict(),
            "profiles": [report.to_dict() for report in profiles],
        },
        bench_table(comparison, ran),
        [*bench_notes(comparison), *(f"\n{report}" for report in profiles)],
    )


def _rounds(call_ms: float, budget: Budget) -> int:
    """Return how many calls of each kind a profile makes in roughly the budget's time."""
    fit = int(1e3 * budget.seconds / (2 * call_ms))
    return max(budget.fewest, min(fit, budget.most))


def _streams(pair: Contestants, batch: list[int], budget: Budget, *, callers: int) -> _Found:
    """Count images per second, with several calls at once."""
    from biper_engine.bench import throughput

    batches = [random_images(pair.engine, count) for count in batch]
    with status("Counting images per second, all in turn; preparing the rivals takes a while"):
        found = throughput(pair.engine, pair.model, batches, callers=callers, budget=budget)
    ran = _backends(pair)
    return _Found(
        {"engine_backends": ran, **found.to_dict()},
        stream_table(found, ran),
        stream_notes(found),
    )


def _backends(pair: Contestants) -> list[str]:
    from biper_engine.graph.choice import backends_of

    return list(backends_of(pair.engine.graph_module, pair.engine.device))


def _budget(seconds: float | None, rounds: int | None, *, rivals: bool, streams: bool) -> Budget:
    from biper_engine.bench import SLICES, TURNS, Budget

    budget = Budget()
    if rivals:
        budget = replace(TURNS, seconds=20.0)
    if streams:
        budget = SLICES
    if rounds is not None:
        return replace(budget, seconds=0.0, fewest=rounds, most=rounds)
    return budget if seconds is None else replace(budget, seconds=seconds)
