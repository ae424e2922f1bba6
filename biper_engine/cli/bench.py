"""`biper bench`: an engine beside its float network, in one run."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from biper_engine.cli.console import print_json, results, shown_warnings, status
from biper_engine.cli.sources import (
    Arch,
    Frequency,
    InputShape,
    ModelSource,
    Stage,
    Weights,
    example_input,
    load_model,
    random_network,
)
from biper_engine.errors import ConversionError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from biper_engine import Engine
    from biper_engine.bench import Comparison, Contest
    from biper_engine.runtime import ProfileReport

__all__ = ["bench", "bench_table"]


@dataclass(frozen=True, kw_only=True)
class _Contestants:
    """What is compared, and what is known of its equality."""

    engine: Engine
    model: nn.Module
    checked: str


def bench(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A .biper file, a checkpoint, module:callable, or a network's name.",
        ),
    ],
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", "-b", min=1, help="Images per call, repeatable. [default: 1, 64]"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Of every contestant; else torch's.", show_default=False),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of timing per batch size.")] = 5.0,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also time torch.compile.")
    ] = True,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="The model that a .biper file was made from.", show_default=False
        ),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Time this backend, not the usual one.", show_default=False)
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Time every layer, too.")] = False,
    arch: Arch = None,
    frequency: Frequency = None,
    stage: Stage = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Time an engine beside its float network: eager, and through torch.compile.

    All are called in turn in one run with the same threads, after their
    answers were checked. A network's name, such as cifar10/resnet18_1w1a,
    takes random weights.

    [bold]Examples[/bold]
    biper bench digits.biper --against biper-train/stage2.pt
    biper bench cifar10/resnet18_1w1a --batch 1 --batch 8 --threads 1
    biper bench cifar10/vgg_small_1w1a --no-compile --profile
    """
    import biper_engine
    from biper_engine import bench as benchmarks
    from biper_engine.bench.timer import Budget

    _require_consistent_threads(threads)
    wanted = ModelSource(text=source, weights=weights, arch=arch, frequency=frequency, stage=stage)
    with biper_engine.use_backend(backend) if backend else nullcontext():
        pair = _contestants(wanted, against, input_shape)
        batches = [_images(pair.engine, count) for count in batch or (1, 64)]
        with status(
            "Timing all in turn; torch.compile takes a while first" if compiled else "Timing"
        ):
            comparison = benchmarks.compare(
                pair.engine,
                pair.model,
                batches,
                threads=threads,
                compiled=compiled,
                budget=Budget(seconds=seconds),
            )
        profiles = []
        if profile:
            with status("Timing every layer"), benchmarks.torch_threads(threads):
                profiles = [pair.engine.profile(images) for images in batches]
        peak = _peak(profiles) if profile else None
    if json_output:
        print_json(
            {
                "source": source,
                "checked": pair.checked,
                **comparison.to_dict(),
                "profiles": [report.to_dict() for report in profiles],
                "popcount_peak_macs_per_second_per_core": peak,
            }
        )
        return
    console = results()
    console.print(bench_table(comparison))
    console.print(pair.checked, markup=False, soft_wrap=True)
    for report in profiles:
        console.print(f"\n{_profile_text(report, peak)}", markup=False, soft_wrap=True)


def _require_consistent_threads(threads: int | None) -> None:
    forced = os.environ.get("BIPER_NUM_THREADS")
    if forced and threads is not None and forced != str(threads):
        raise typer.BadParameter(
            f"--threads {threads} is for every contestant, but BIPER_NUM_THREADS={forced} gives "
            "the engine another number: unset one of them."
        )


# -- what is compared -----------------------------------------------------------------------------


def _contestants(source: ModelSource, against: str | None, input_shape: str | None) -> _Contestants:
    import biper_engine
    from biper_engine import models

    if Path(source.text).suffix == ".biper":
        return _of_file(Path(source.text), source, against)
    if against is not None:
        raise typer.BadParameter("--against is for .biper files; other sources are the model.")
    with status("Loading the model"):
        if source.text in models.available():
            model = random_network(source.text)
        else:
            model = load_model(source)
        example = example_input(model, input_shape)
    with status("Converting"), shown_warnings():
        engine = biper_engine.convert(model, example, check=False)
    return _checked_against(engine, model)


def _of_file(path: Path, source: ModelSource, against: str | None) -> _Contestants:
    import biper_engine
    from biper_engine import models

    with status("Loading"):
        engine = biper_engine.load(path)
    if against is not None:
        model = load_model(
            ModelSource(
                text=against,
                weights=source.weights,
                arch=source.arch,
                frequency=source.frequency,
                stage=source.stage,
            )
        )
        return _checked_against(engine, model)
    architecture = engine.provenance.architecture if engine.provenance is not None else None
    if architecture not in models.available():
        raise typer.BadParameter(
            f"'{path}' does not say which known network it was made from, so there is no float "
            "network to compare with. Pass the model: --against CHECKPOINT, or module:callable."
        )
    with status("Comparing each operator with the reference"):
        report = biper_engine.serialization.check_backend(engine)
    if not report.ok:
        raise ConversionError(f"Nothing was timed.\n{report.table()}")
    classes = engine(_images(engine, 1)).shape[1]
    return _Contestants(
        engine=engine,
        model=random_network(architecture, num_classes=classes),
        checked=(
            f"{len(report.nodes)} of {len(report.nodes)} operators equal the reference. The float "
            f"network is {architecture} with random weights: the same work, other answers."
        ),
    )


def _checked_against(engine: Engine, model: nn.Module) -> _Contestants:
    import biper_engine

    with status("Comparing with the model"):
        report = biper_engine.verify(engine, model, _images(engine, 2))
    if not report.ok:
        raise ConversionError(f"Nothing was timed: the engine differs.\n{report.table()}")
    return _Contestants(
        engine=engine,
        model=model,
        checked=(
            f"{report.layers_equal} of {report.layers} binary layers equal the float network's, "
            f"logit error {report.logit_error:.1e}."
        ),
    )


def _images(engine: Engine, count: int) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *engine.input_shape, generator=generator)


# -- what is printed ------------------------------------------------------------------------------


def bench_table(comparison: Comparison) -> Table:
    """Return one row per contestant and batch size."""
    threads = comparison.threads
    backend = comparison.machine.get("cpu_backend", "reference backend")
    table = Table(
        title=f"{threads} thread{'s' * (threads != 1)} each, all in turn; engine: {backend}",
        caption="; ".join(f"{name}: {how}" for name, how in comparison.settings.items()),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("batch", justify="right")
    table.add_column("")
    table.add_column("ms", justify="right")
    table.add_column("quartiles", justify="right")
    table.add_column("images/s", justify="right")
    table.add_column("engine is", justify="right")
    for contest in comparison.contests:
        for cells in _contest_rows(contest):
            table.add_row(*cells)
        table.add_section()
    return table


def _contest_rows(contest: Contest) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, taken in contest.samples.items():
        low, high = taken.quartiles_ms
        rows.append(
            (
                str(contest.batch),
                name,
                f"{taken.median_ms:.3f}",
                f"{low:.3f} - {high:.3f}",
                f"{1e3 * contest.batch / taken.median_ms:,.0f}",
                "" if name == "engine" else f"{contest.times_as_fast(name):.1f}x as fast",
            )
        )
    rows += [
        (str(contest.batch), name, "did not run:", reason, "", "")
        for name, reason in contest.reasons.items()
    ]
    return rows


def _peak(profiles: list[ProfileReport]) -> float | None:
    """Return the popcount peak of a core, if the cpu backend ran anything."""
    if not any(node.backend == "cpu" for report in profiles for node in report.nodes):
        return None
    from biper_engine.ops.cpu import popcount_peak

    return popcount_peak().macs_per_second


def _profile_text(report: ProfileReport, peak: float | None) -> str:
    if peak is None:
        return report.table()
    from biper_engine.ops.cpu import thread_count

    threads = thread_count()
    note = (
        f"peak: {peak * 1e-9:,.0f} GMAC/s a core, popcounts on registers alone, measured now, "
        f"times {threads}"
    )
    return f"{report.table(peak * threads)}\n{note}"
