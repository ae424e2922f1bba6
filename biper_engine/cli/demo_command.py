"""`biper demo`: run the demo, print its measurements and save them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from biper_engine.cli.console import command_line, print_json, results, show_error, status
from biper_engine.files import write_atomically

if TYPE_CHECKING:
    from biper_engine.cli.demo import DemoResult

__all__ = ["demo"]

ENGINE = "engine"
RIVALS = {"float, eager": "eager", "float, torch.compile": "torch.compile"}


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for all its files.")
    ] = Path("biper-demo"),
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Train, convert, verify, save, reload and time a BiPer net on real digits.

    This takes about two minutes on two cores, and downloads nothing. It trains
    with one thread, and times the networks with all.

    The exit code is 0 only if engine and float net have equal top-1 on all test
    images, every layer is verified, and the reloaded file gives the same bits.

    [bold]Examples[/bold]
    biper demo
    biper demo --output elsewhere --json
    """
    start = perf_counter()
    console = results(json_output=json_output)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    with status("Loading PyTorch"):
        from biper_engine.cli.demo import run_demo

    result = run_demo(output, say, progress_bar=sys.stderr.isatty())
    with status("Plotting"):
        from biper_engine.cli.demo_plot import write_plot

        write_plot(result, output / "demo.png")
    values = {**result.to_dict(), "seconds": perf_counter() - start}
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(output / "demo.json", lambda file: file.write(text.encode()))
    if json_output:
        print_json(values)
    else:
        console.print(_table(result))
    for line in _notes(result, output, perf_counter() - start):
        say(line)
    if result.failures:
        show_error(ValueError("The demo failed: " + "; ".join(result.failures) + "."))
        raise typer.Exit(1)


def _table(result: DemoResult) -> Table:
    split = f"first {result.train_images:,} train, last {result.test_images} test, unshuffled"
    table = Table(
        title=f"{result.architecture} on handwritten digits\n{split}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
    )
    table.add_column("")
    table.add_column("float net", justify="right")
    table.add_column("engine", justify="right")
    table.add_column("")
    count = result.test_images
    table.add_row(
        f"accuracy, {count} test digits",
        f"{result.float_accuracy:.1%}",
        f"{result.engine_accuracy:.1%}",
        f"top-1 equal on {result.top1_equal} of {count}",
    )
    table.add_row(
        "bytes: weights, .biper file",
        f"{result.float_bytes:,}",
        f"{result.file_bytes:,}",
        f"{result.float_bytes / result.file_bytes:.1f} times smaller",
    )
    for contest in result.comparison.contests:
        ours = contest.samples[ENGINE].median_ms
        for name, label in RIVALS.items():
            if name in contest.samples:
                row = f"ms, batch {contest.batch}, {label}"
                table.add_row(*_time_row(row, contest.samples[name].median_ms, ours))
            elif name in contest.reasons:
                table.add_row(f"ms, batch {contest.batch}, {label}", "did not run", "", "")
    if result.resnet18 is not None:
        times = result.resnet18
        row = "ms, ResNet-18's 3x3 layers*"
        table.add_row(*_time_row(row, times.float_conv.median_ms, times.engine.median_ms))
    return table


def _time_row(label: str, float_ms: float, engine_ms: float) -> tuple[str, ...]:
    ratio = float_ms / engine_ms
    said = f"{ratio:.1f} times faster" if ratio >= 1 else f"{1 / ratio:.1f} times slower"
    return label, f"{float_ms:.2f}", f"{engine_ms:.2f}", said


def _notes(result: DemoResult, output: Path, seconds: float) -> list[str]:
    threads = result.comparison.threads
    lines = [
        f"Medians of calls in turn, {threads} thread{'s' * (threads != 1)} each, float32, "
        f"channels_last; engine on: {', '.join(result.backends)}.",
        "eager: the network as written, which takes signs of its weights in every call.",
    ]
    reasons = {r for contest in result.comparison.contests for r in contest.reasons.values()}
    lines += [f"torch.compile did not run: {reason}" for reason in sorted(reasons)]
    if result.resnet18 is not None:
        lines += [
            "* the 16 binary convolutions of an ImageNet ResNet-18, one image: F.conv2d alone",
            "  beside convolution, scale, residual, clamp and the next sign on bits.",
        ]
    if result.backends == ("reference",):
        lines += [
            "The reference backend is the definition in plain PyTorch: it unpacks the bits, and",
            "may be slower than the float net. `biper backends` says why no faster one runs here.",
        ]
    lines.append("")
    digit = next(iter(sorted((output / "digits").glob("7_*.png"))), output / "digits")
    file = output / "digits.biper"
    return [
        *lines,
        f"{seconds:.0f} s. In {output}: demo.json, demo.png, digits.biper, digits/",
        "",
        "Next:",
        f"  {command_line('run', file, digit)}",
        f"  {command_line('verify', file)}",
        "  "
        + command_line(
            *("verify", file, "--against", output / "training" / "stage2.pt"),
            *("--images", output / "digits"),
        ),
    ]
