"""`biper bench`: an engine beside its float network, in one run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from biper_engine.cli.console import print_json, results, status
from biper_engine.cli.contestants import contestants, random_images
from biper_engine.cli.sources import (
    Arch,
    Frequency,
    InputShape,
    ModelSource,
    Stage,
    Weights,
)

if TYPE_CHECKING:
    from biper_engine.bench import Budget, Comparison, Contest

__all__ = ["bench", "bench_table"]

_DISTURBED = 1.05


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
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Of timing per batch size. [default: 5; with --rivals 20]",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Calls of each, in place of --seconds.", show_default=False),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also time torch.compile.")
    ] = True,
    rivals: Annotated[
        bool,
        typer.Option("--rivals", help="Also time ONNX Runtime, OpenVINO and bfloat16."),
    ] = False,
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
    r"""Time an engine beside its float network: eager, and through torch.compile.

    All are called in turn in one run with the same threads, after their
    answers were checked. A network's name, such as cifar10/resnet18_1w1a,
    takes random weights.

    --rivals adds torch.compile in bfloat16; the same layers in float on ONNX
    Runtime and OpenVINO, in float32, bfloat16 and int8; and the engine's own
    graph on OpenVINO's binary convolution. What is not installed is named:
    pip install "biper-engine\[bench]" brings all.

    [bold]Examples[/bold]
    biper bench digits.biper --against biper-train/stage2.pt
    biper bench cifar10/resnet18_1w1a --batch 1 --batch 8 --threads 1
    biper bench cifar10/vgg_small_1w1a --no-compile --profile
    biper bench imagenet/resnet18_1w1a --rivals --batch 1 --batch 8
    """
    import biper_engine
    from biper_engine.bench import common_threads, compare, torch_threads
    from biper_engine.runtime import backends_of

    try:
        threads = common_threads(threads)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    wanted = ModelSource(text=source, weights=weights, arch=arch, frequency=frequency, stage=stage)
    slow = [name for name, on in (("torch.compile", compiled), ("rivals", rivals)) if on]
    takes = "take" if rivals else "takes"
    waiting = (
        f"Timing all in turn; {' and '.join(slow)} {takes} a while first" if slow else "Timing"
    )
    with (
        biper_engine.use_backend(backend) if backend else nullcontext(),
        torch_threads(threads),
    ):
        pair = contestants(wanted, against, input_shape)
        ran = backends_of(pair.engine.graph_module, pair.engine.device)
        batches = [random_images(pair.engine, count) for count in batch or (1, 64)]
        with status(waiting):
            comparison = compare(
                *(pair.engine, pair.model, batches),
                threads=threads,
                compiled=compiled,
                deployed=rivals,
                budget=_budget(seconds, rounds, rivals),
            )
        with status("Timing every layer"):
            profiles = [pair.engine.profile(images) for images in batches if profile]
    if json_output:
        print_json(
            {
                "source": source,
                "checked": pair.checked,
                "engine_backends": list(ran),
                **comparison.to_dict(),
                "profiles": [report.to_dict() for report in profiles],
            }
        )
        return
    console = results()
    console.print(bench_table(comparison, ran))
    for text in [pair.checked, *_notes(comparison), *(f"\n{report}" for report in profiles)]:
        console.print(text, markup=False, soft_wrap=True)


def _budget(seconds: float | None, rounds: int | None, rivals: bool) -> Budget:
    from biper_engine.bench import TURNS, Budget

    budget = TURNS if rivals else Budget()
    if rounds is not None:
        return replace(budget, seconds=0.0, fewest=rounds, most=rounds)
    if seconds is None:
        seconds = 20.0 if rivals else 5.0
    return replace(budget, seconds=seconds)


# -- what is printed ------------------------------------------------------------------------------


def bench_table(comparison: Comparison, ran: Sequence[str]) -> Table:
    """Return one row per contestant and batch size.

    Args:
        comparison: what was measured.
        ran: the backends that ran the engine's operators.
    """
    threads = comparison.threads
    native = f" ({comparison.machine.get('cpu_backend')})" if "cpu" in ran else ""
    on = ", ".join(ran) or "torch"
    table = Table(
        title=f"{threads} thread{'s' * (threads != 1)} each, all in turn; engine on: {on}{native}",
        caption="\n".join(f"{name}: {how}" for name, how in comparison.settings.items()),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
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
                _ms(taken.median_ms),
                f"{_ms(low)} - {_ms(high)}",
                f"{1e3 * contest.batch / taken.median_ms:,.0f}",
                "" if name == "engine" else f"{contest.times_as_fast(name):.1f}x as fast",
            )
        )
    rows += [(str(contest.batch), name, "", "did not run", "", "") for name in contest.reasons]
    return rows


def _ms(ms: float) -> str:
    return f"{ms:.3f}" if ms < 100 else f"{ms:.1f}"


def _notes(comparison: Comparison) -> list[str]:
    """Return what the table does not say, each thing once, its worst over all batch sizes.

    Which rivals did not run, and why; how far outputs are from what they are compared with; and
    which rivals are slower in turn than alone.
    """
    lines: dict[str, None] = {}
    largest: dict[str, tuple[float, str]] = {}
    for contest in comparison.contests:
        lines |= {f"{name} did not run: {why}": None for name, why in contest.reasons.items()}
        for name, difference in contest.differences.items():
            beside = contest.beside.get(name, "eager")
            largest[name] = max((difference, beside), largest.get(name, (0.0, beside)))
    for name, (difference, beside) in largest.items():
        lines[f"{name}: outputs within {difference:.1e} of {beside}'s, over the largest one"] = None
    for contest in comparison.contests:
        lines |= dict.fromkeys(_disturbed(contest))
    return list(lines)


def _disturbed(contest: Contest) -> list[str]:
    """Return a line for each contestant that is over 5 % slower in turn than alone."""
    lines = []
    for name, alone_ms in contest.alone_ms.items():
        in_turn_ms = contest.samples[name].median_ms
        if in_turn_ms > _DISTURBED * alone_ms:
            lines.append(
                f"{name}, batch {contest.batch}: {_ms(in_turn_ms)} ms in turn, {_ms(alone_ms)} ms "
                f"alone ({in_turn_ms / alone_ms - 1:+.0%})"
            )
    return lines
