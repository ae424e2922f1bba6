"""The plot of `frontier_result.py`: published accuracy against measured latency."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from frontier_result import BITS, Network, Result

from biper_engine.files import write_atomically
from biper_engine.plotting import COMPILED, ENGINE, FLOAT, GRID, INK, SOFT_INK, new_figure, title

__all__ = ["digest", "draw", "write_plot"]

# Colour, marker and name in the legend.
_STYLES = {
    "bits": (ENGINE, "o", "on bits, this engine"),
    "float32": (COMPILED, "s", "float32, OpenVINO"),
    "bfloat16": (FLOAT, "D", "bfloat16, OpenVINO"),
    "int8": (SOFT_INK, "v", "int8, OpenVINO"),
}
_TICKS_MS = [value * 10**power for power in range(-2, 4) for value in (1, 2, 5)]
_POINTS_BELOW, _POINTS_ABOVE, _POINTS_APART = 4, 2, 5


def digest(path: Path) -> str:
    """Return the "Source" entry of a plot: the file from which it was made."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_plot(result: Result, path: Path, source: Path) -> None:
    """Draw a result into a PNG, without a display.

    Args:
        result: the measurements.
        path: path of the PNG.
        source: the file from which the result was read.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, metadata = draw(result), {"Source": digest(source)}
    write_atomically(path, lambda file: figure.savefig(file, format="png", metadata=metadata))


def draw(result: Result) -> Any:
    """Return the figure: a panel for each batch size, with a common accuracy axis."""
    figure = new_figure(10, 5)
    panels = figure.subplots(1, len(result.batches), sharey=True, squeeze=False)[0]
    for axes, batch in zip(panels, result.batches, strict=True):
        _panel(axes, result, batch)
    panels[0].set_ylabel("top-1 on ImageNet as published, %", fontsize=9, color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=5,
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )
    figure.suptitle(
        "Published accuracy against latency measured here",
        color=INK,
        fontsize=12,
        fontweight="bold",
    )
    return figure


def _panel(axes: Any, result: Result, batch: int) -> None:
    ran = result.ran(batch)
    title(
        axes,
        f"Batch {batch}",
        f"median of calls in turn, {result.threads} thread{'s' * (result.threads != 1)} each, "
        "random weights",
    )
    _scales(axes, result, ran[0].ms[batch] / 1.6, ran[-1].ms[batch] * 2.5)
    for runs, (color, marker, label) in _STYLES.items():
        ours = [one for one in ran if one.runs == runs]
        places = [one.ms[batch] for one in ours], [one.top1 for one in ours]
        axes.scatter(*places, s=46, color=color, marker=marker, label=label, zorder=3)
    _best(axes, result, batch)
    for name in dict.fromkeys(one.network for one in ran):
        _label(axes, [one for one in ran if one.network == name], batch)


def _scales(axes: Any, result: Result, left_ms: float, right_ms: float) -> None:
    low = min(one.top1 for one in result.networks) - _POINTS_BELOW
    high = max(one.top1 for one in result.networks) + _POINTS_ABOVE
    axes.set_xscale("log")
    axes.set_xlim(left_ms, right_ms)
    axes.set_ylim(low, high)
    ticks = [tick for tick in _TICKS_MS if left_ms <= tick <= right_ms]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    first = -int(-low // _POINTS_APART) * _POINTS_APART
    axes.set_yticks(range(first, int(high) + 1, _POINTS_APART))
    axes.set_xlabel("milliseconds a call (log scale)", fontsize=9, color=INK)
    axes.tick_params(labelsize=9, labelcolor=INK)
    axes.grid(color=GRID, linewidth=0.5, alpha=0.6)


def _best(axes: Any, result: Result, batch: int) -> None:
    """Draw the highest accuracy that is available within a time."""
    best = result.best(batch)
    _, right_ms = axes.get_xlim()
    times, accuracies = [one.ms[batch] for one in best], [one.top1 for one in best]
    axes.step(
        [*times, right_ms],
        [*accuracies, accuracies[-1]],
        where="post",
        color=INK,
        linewidth=1,
        linestyle="--",
        label="most accurate within a time",
        zorder=2,
    )


def _label(axes: Any, points: list[Network], batch: int) -> None:
    """Write a network's name above its points, beside one on bits; the table has the times."""
    times = [one.ms[batch] for one in points]
    place = ((times[0] * times[-1]) ** 0.5, points[0].top1)
    looks = {"fontsize": 8, "color": INK, "zorder": 4, "textcoords": "offset points"}
    if points[0].runs == BITS:
        axes.annotate(points[0].network, place, (6, 0), ha="left", va="center", **looks)
    else:
        axes.annotate(points[0].network, place, (0, 7), ha="center", **looks)
