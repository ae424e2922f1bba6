"""The demo's plot: accuracy, bytes and time of the float net and the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biper_engine.files import write_atomically
from biper_engine.plotting import COMPILED, ENGINE, FLOAT, INK, new_figure, title

if TYPE_CHECKING:
    from biper_engine.cli.demo import DemoResult

__all__ = ["write_plot"]

_TIMED = {
    "float, eager": "float net",
    "float, torch.compile": "float net, torch.compile",
    "engine": "engine",
}
_RIGHT, _WRONG = "#15803d", "#b91c1c"
_COLORS = {"float net": FLOAT, "float net, torch.compile": COMPILED, "engine": ENGINE}


def write_plot(result: DemoResult, path: Path) -> None:
    """Draw three panels into a PNG, without a display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(10, 4.2)
    accuracy, size, time = figure.subplots(1, 3, width_ratios=(1, 1, 1.35))
    count = result.test_images
    _accuracy(accuracy, result)
    title(accuracy, "Accuracy", f"top-1 equal on {result.top1_equal} of {count} test digits")
    _bars(
        size,
        [""],
        {"float net": [result.float_bytes / 1e3], "engine": [result.file_bytes / 1e3]},
        lambda value: f"{value:,.0f} kB",
    )
    ratio = result.float_bytes / result.file_bytes
    title(size, "Size", f"float weights, .biper file: {ratio:.1f} times smaller")
    contests = result.comparison.contests
    _bars(
        time,
        [f"batch {contest.batch}" for contest in contests],
        {
            label: [contest.samples[name].median_ms / contest.batch for contest in contests]
            for name, label in _TIMED.items()
            if all(name in contest.samples for contest in contests)
        },
        lambda value: f"{value:.2f} ms",
    )
    threads = result.comparison.threads
    ran = ", ".join(result.backends)
    title(
        time,
        "Time per image",
        f"median of calls in turn, {threads} thread{'s' * (threads != 1)}; engine on: {ran}",
    )
    handles, labels = time.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, labelcolor=INK
    )
    figure.suptitle(
        f"{result.architecture} on handwritten digits "
        f"({result.train_images:,} train, {count} test)",
        color=INK,
        fontsize=12,
        fontweight="bold",
    )
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _accuracy(axes: Any, result: DemoResult) -> None:
    """Draw right and wrong images: one bar for both networks if they answer alike, else two."""
    shares = {"float net": result.float_accuracy, "engine": result.engine_accuracy}
    if result.top1_equal == result.test_images:
        shares = {"float net and engine, alike": result.engine_accuracy}
    for place, (name, share) in enumerate(shares.items()):
        right = round(share * result.test_images)
        wrong = result.test_images - right
        axes.barh(place, share, 0.5, color=_RIGHT)
        axes.barh(place, 1 - share, 0.5, left=share, color=_WRONG)
        text = f"{share:.1%}: {right} right"
        axes.text(0.03, place, text, color="white", va="center", fontsize=9)
        axes.text(1.0, place - 0.3, f"{wrong} wrong", color=INK, ha="right", va="top", fontsize=8)
        axes.text(0.0, place + 0.3, name, color=INK, va="bottom", fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.9, len(shares) - 0.1)
    axes.set_xticks([])
    axes.set_yticks([])


def _bars(
    axes: Any,
    groups: Sequence[str],
    series: Mapping[str, list[float]],
    text: Callable[[float], str],
) -> None:
    step = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * step
        places = [group + offset for group in range(len(groups))]
        bars = axes.bar(places, values, 0.9 * step, color=_COLORS[name], label=name)
        axes.bar_label(bars, [text(value) for value in values], padding=3, fontsize=8, color=INK)
    axes.set_xticks(range(len(groups)), groups, color=INK)
    axes.set_yticks([])
    axes.set_xlim(-0.55, len(groups) - 0.45)
    axes.set_ylim(0, 1.15 * max(max(values) for values in series.values()))
