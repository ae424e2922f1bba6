"""Pictures of `gpu_report.py`: images a second, latencies, and layers beside their ceilings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from biper_engine.bench.plot import COMPILED, ENGINE, FLOAT, GRID, INK, SOFT_INK, new_figure, title

__all__ = ["latencies", "rates", "roofline"]

# Colour, marker, line and label; in the order of the legend.
_STYLES = {
    "cuda float16": (ENGINE, "o", "-", "engine, CUDA, float16"),
    "cuda bfloat16": ("#60a5fa", "D", ":", "engine, CUDA, bfloat16"),
    "cuda float32": ("#1e3a8a", "s", "-", "engine, CUDA, exact float32"),
    "triton float16": ("#0d9488", "^", "-", "engine, Triton, float16"),
    "compile float16": (COMPILED, "o", "--", "float twin, torch.compile max-autotune float16"),
    "compile bfloat16": ("#b7791f", "D", "--", "float twin, torch.compile max-autotune bfloat16"),
    "eager float16": (FLOAT, "s", "--", "float twin, eager float16"),
}
_COLUMNS = 3
_BACKENDS = {"cuda": (ENGINE, "CUDA"), "triton": ("#0d9488", "Triton")}
_PRODUCT = "product"


def rates(rows: Sequence[Mapping[str, Any]], gpu: str) -> Any:
    """Return a figure with images a second over batch sizes, a panel for each network."""
    return _panels(
        rows,
        f"Images a second on {gpu}",
        "calls one behind another; medians, weights random; log scales",
        "throughput_ms",
        lambda batch, ms: 1e3 * batch / ms,
        floor=True,
    )


def latencies(rows: Sequence[Mapping[str, Any]], gpu: str) -> Any:
    """Return a figure with microseconds of a single call over batch sizes."""
    return _panels(
        rows,
        f"Microseconds of one call on {gpu}",
        "from the call until the device is done; medians, weights random; log scales",
        "latency_ms",
        lambda batch, ms: 1e3 * ms,
        floor=False,
    )


def _panels(
    rows: Sequence[Mapping[str, Any]],
    head: str,
    subtitle: str,
    figures: str,
    value: Callable[[int, float], float],
    *,
    floor: bool,
) -> Any:
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lines = -(-len(networks) // _COLUMNS)
    figure = new_figure(12, 1.3 + 3.1 * lines)
    grid = figure.subplots(lines, _COLUMNS, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for axes, network in zip(grid, networks, strict=False):
        own = sorted((row for row in rows if row["network"] == network), key=lambda r: r["batch"])
        title(axes, network, "")
        for number, (who, (color, marker, line, label)) in enumerate(_STYLES.items()):
            points = [
                (row["batch"], value(row["batch"], row[figures][who]))
                for row in own
                if who in row[figures]
            ]
            looks = {"color": color, "marker": marker, "linestyle": line, "markersize": 4}
            _line(axes, points, label, handles, **looks, zorder=9 - number)
        floors = [
            (row["batch"], value(row["batch"], row["floor_ms"])) for row in own if row["floor_ms"]
        ]
        if floor:
            label = "ceiling of one kernel for each layer"
            _line(axes, floors, label, handles, color=INK, linestyle=":")
        _log_axes(axes, [row["batch"] for row in own])
    for axes in grid[len(networks) :]:
        axes.set_visible(False)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        labelcolor=INK,
        fontsize=8,
    )
    _head(figure, head, subtitle)
    return figure


def _line(
    axes: Any, points: Sequence[Any], label: str, handles: dict[str, Any], **looks: Any
) -> None:
    if points:
        (handles[label],) = axes.plot(*zip(*points, strict=True), linewidth=1.4, **looks)


def _head(figure: Any, head: str, subtitle: str) -> None:
    figure.suptitle(f"{head}\n", color=INK, fontsize=12, fontweight="bold")
    top = 1 - 0.36 / figure.get_figheight()
    figure.text(0.5, top, subtitle, ha="center", va="top", fontsize=8, color=SOFT_INK)


def _log_axes(axes: Any, batches: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda amount, _: _short(amount))
    axes.set_xlabel("images a call", fontsize=8, color=SOFT_INK)
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=INK)
    axes.grid(color=GRID, linewidth=0.5, alpha=0.6)


def _short(amount: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "K")):
        if amount >= size:
            return f"{amount / size:g} {unit}"
    return f"{amount:g}"


def roofline(rows: Sequence[Mapping[str, Any]], gpu: str) -> Any:
    """Return a figure with each layer's share of its own roofline, a panel for each batch size.

    Products, which have no batch, are in the last.
    """
    batches = sorted({row["batch"] for row in rows if row["network"] != _PRODUCT} or {1})
    names = list(dict.fromkeys(_layer(row) for row in rows))
    figure = new_figure(12, 1.9 + 0.27 * len(names))
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    present = [name for name in _BACKENDS if any(name in row["share"] for row in rows)]
    for axes, batch in zip(panels, batches, strict=True):
        shown = [
            row
            for row in rows
            if (batches[-1] if row["network"] == _PRODUCT else row["batch"]) == batch
        ]
        title(axes, f"Batch {batch}", "")
        _bars(axes, shown, names, present)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    _head(
        figure,
        f"Layers beside their roofline on {gpu}",
        "the slower of bytes over copy bandwidth and bit-MACs over their peak, "
        "in % of the time taken; medians, CUDA graphs",
    )
    return figure


def _bars(
    axes: Any, rows: Sequence[Mapping[str, Any]], names: list[str], present: list[str]
) -> None:
    height = 0.8 / max(len(present), 1)
    for number, backend in enumerate(present):
        color, label = _BACKENDS[backend]
        found = [
            (names.index(_layer(row)), 100 * row["share"][backend])
            for row in rows
            if row["share"].get(backend)
        ]
        offset = (number - (len(present) - 1) / 2) * height
        places, shares = [place + offset for place, _ in found], [percent for _, percent in found]
        axes.barh(places, shares, height=0.9 * height, color=color, label=label, zorder=2)
        for place, percent in zip(places, shares, strict=True):
            axes.text(percent + 1.5, place, f"{percent:.0f}", va="center", fontsize=6, color=INK)
    axes.axvline(100, color=INK, linestyle=":", linewidth=1.2, zorder=3)
    axes.set_xlim(0, max(115, *axes.get_xlim()))
    axes.set_xlabel("% of the roofline", fontsize=8, color=SOFT_INK)
    axes.tick_params(labelsize=7, labelcolor=INK)
    axes.grid(axis="x", color=GRID, linewidth=0.5, alpha=0.6)


def _layer(row: Mapping[str, Any]) -> str:
    return f"{row['network']} {row['layer']}, {row['variant']}"
