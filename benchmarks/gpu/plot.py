"""Plots of `gpu.report`: images per second, and layers relative to their rooflines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import EngFormatter, NullFormatter

from biper_engine.plotting import COMPILED, ENGINE, FLOAT, GRID, INK, SOFT_INK, new_figure, title

_TEAL = "#0d9488"
# Colour, marker, line and label, in the order of the legend.
_STYLES = {
    "cuda float16": (ENGINE, "o", "-", "engine, CUDA, float16"),
    "cuda float32": ("#1e3a8a", "s", "-", "engine, CUDA, exact float32"),
    "triton float16": (_TEAL, "^", "-", "engine, Triton, float16"),
    "triton float32": ("#115e59", "v", "-", "engine, Triton, exact float32"),
    "compile float16": (COMPILED, "o", "--", "float twin, torch.compile max-autotune float16"),
    "eager float16": (FLOAT, "s", "--", "float twin, eager float16"),
}
_COLUMNS = 3
_BACKENDS = {"cuda": (ENGINE, "CUDA"), "triton": (_TEAL, "Triton")}


def rates(contests: Sequence[Mapping[str, Any]], gpu: str) -> Any:
    """Return a figure with images per second over batch sizes, a panel for each network.

    If two contests have the same contestant at the same batch, the first one's figure is shown.
    """
    networks = list(dict.fromkeys(one["network"] for one in contests))
    lines = -(-len(networks) // _COLUMNS)
    figure = new_figure(12, 1.5 + 3.2 * lines)
    grid = figure.subplots(lines, min(len(networks), _COLUMNS), squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for axes, network in zip(grid, networks, strict=False):
        title(axes, network, "")
        own = [one for one in contests if one["network"] == network]
        for number, (who, (color, marker, line, label)) in enumerate(_STYLES.items()):
            first = {
                one["batch"]: 1e3 * one["batch"] / one["time"][who]
                for one in reversed(own)
                if who in one["time"]
            }
            if first:
                looks = {"color": color, "marker": marker, "linestyle": line, "zorder": 9 - number}
                points = zip(*sorted(first.items()), strict=True)
                (handles[label],) = axes.plot(*points, linewidth=1.4, markersize=4, **looks)
        _log_axes(axes, sorted({one["batch"] for one in own}))
    for axes in grid[len(networks) :]:
        axes.set_visible(False)
    subtitle = "device time in a CUDA graph; medians, weights random; log scales"
    _finish(figure, handles, f"Images per second on {gpu}", subtitle)
    return figure


def _log_axes(axes: Any, batches: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("images per call", fontsize=8, color=SOFT_INK)
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=INK)
    axes.grid(color=GRID, linewidth=0.5, alpha=0.6)


def _finish(figure: Any, handles: Mapping[str, Any], head: str, subtitle: str) -> None:
    place = {"loc": "outside lower center", "ncols": 3, "frameon": False}
    figure.legend(handles.values(), handles.keys(), **place, labelcolor=INK, fontsize=8)
    figure.suptitle(f"{head}\n", color=INK, fontsize=12, fontweight="bold")
    top = 1 - 0.36 / figure.get_figheight()
    figure.text(0.5, top, subtitle, ha="center", va="top", fontsize=8, color=SOFT_INK)


def roofline(rows: Sequence[Mapping[str, Any]], gpu: str) -> Any:
    """Return a figure with each layer's share of its own roofline, a panel for each batch size."""
    batches = sorted({row["batch"] for row in rows})
    names = list(dict.fromkeys(row["layer"] for row in rows))
    figure = new_figure(12, 1.9 + 0.3 * len(names))
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    present = [name for name in _BACKENDS if any(name in row["share"] for row in rows)]
    for axes, batch in zip(panels, batches, strict=True):
        title(axes, f"Batch {batch}", "")
        _bars(axes, [row for row in rows if row["batch"] == batch], names, present)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    labelled = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels)
    handles = {label: handle for pairs in labelled for handle, label in pairs}
    subtitle = "the longer of bytes over copy bandwidth and multiply-accumulates over their peak"
    head = f"Layers of ResNet-18 relative to their roofline on {gpu}"
    _finish(figure, handles, head, f"{subtitle}, in % of the time taken")
    return figure


def _bars(
    axes: Any, rows: Sequence[Mapping[str, Any]], names: list[str], present: list[str]
) -> None:
    height = 0.8 / max(len(present), 1)
    for number, backend in enumerate(present):
        color, label = _BACKENDS[backend]
        offset = (number - (len(present) - 1) / 2) * height
        for row in (row for row in rows if backend in row["share"]):
            place = names.index(row["layer"]) + offset
            percent = 100 * row["share"][backend]
            axes.barh(place, percent, height=0.9 * height, color=color, label=label, zorder=2)
            axes.text(percent + 1.5, place, f"{percent:.0f}", va="center", fontsize=6, color=INK)
    axes.axvline(100, color=INK, linestyle=":", linewidth=1.2, zorder=3)
    axes.set_xlim(0, max(115, *axes.get_xlim()))
    axes.set_xlabel("% of the roofline", fontsize=8, color=SOFT_INK)
    axes.tick_params(labelsize=7, labelcolor=INK)
    axes.grid(axis="x", color=GRID, linewidth=0.5, alpha=0.6)
