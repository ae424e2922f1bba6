"""Pictures of `gpu_report.py`: images a second, latencies, and layers beside their ceilings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from biper_engine.bench.plot import COMPILED, ENGINE, FLOAT, GRID, INK, SOFT_INK, new_figure, title

__all__ = ["latencies", "rates", "roofline"]

# Colour, marker, line and label; in the order of the legend.
_STYLES = {
    "cuda float16": (ENGINE, "o", "-", "engine, CUDA, float16"),
    "cuda bfloat16": ("#60a5fa", "D", "-", "engine, CUDA, bfloat16"),
    "cuda float32": ("#1e3a8a", "s", "-", "engine, CUDA, exact float32"),
    "triton float16": ("#0d9488", "^", "-", "engine, Triton, float16"),
    "compile float16": (COMPILED, "o", "--", "float twin, torch.compile max-autotune float16"),
    "compile bfloat16": ("#b7791f", "D", "--", "float twin, torch.compile max-autotune bfloat16"),
    "eager float16": (FLOAT, "s", "--", "float twin, eager float16"),
}
_COLUMNS = 3
_BACKENDS = {"cuda": (ENGINE, "CUDA"), "triton": ("#0d9488", "Triton")}
_MOST_LAYERS = 40


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
        for who, (color, marker, line, label) in _STYLES.items():
            points = [
                (row["batch"], value(row["batch"], row[figures][who]))
                for row in own
                if who in row[figures]
            ]
            if points:
                (handles[label],) = axes.plot(
                    *zip(*points, strict=True),
                    color=color,
                    marker=marker,
                    linestyle=line,
                    markersize=4,
                    linewidth=1.4,
                )
        points = [
            (row["batch"], value(row["batch"], row["floor_ms"]))
            for row in own
            if floor and row["floor_ms"]
        ]
        if points:
            label = "ceiling of one kernel for each layer"
            (handles[label],) = axes.plot(
                *zip(*points, strict=True), color=INK, linestyle=":", linewidth=1.2
            )
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
    figure.suptitle(f"{head}\n", color=INK, fontsize=12, fontweight="bold")
    figure.text(
        0.5,
        1 - 0.36 / figure.get_figheight(),
        subtitle,
        ha="center",
        va="top",
        fontsize=8,
        color=SOFT_INK,
    )
    return figure


def _log_axes(axes: Any, batches: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda amount, _: _short(amount))
    axes.set_xlabel("images a call", fontsize=8, color=SOFT_INK)
    axes.tick_params(labelsize=8, labelcolor=INK)
    axes.grid(color=GRID, linewidth=0.5, alpha=0.6)


def _short(amount: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "K")):
        if amount >= size:
            return f"{amount / size:g} {unit}"
    return f"{amount:g}"


def roofline(rows: Sequence[Mapping[str, Any]], gpu: str) -> Any:
    """Return a figure with each layer's share of its own roofline, the most important first."""
    shown = rows[:_MOST_LAYERS]
    figure = new_figure(10, 1.6 + 0.27 * len(shown))
    axes = figure.subplots()
    title(
        axes,
        f"Layers beside their roofline on {gpu}",
        "the slower of bytes over copy bandwidth and bit-MACs over their peak, over the time taken",
    )
    present = [name for name in _BACKENDS if any(name in row["share"] for row in shown)]
    height = 0.8 / max(len(present), 1)
    for number, name in enumerate(present):
        color, label = _BACKENDS[name]
        places = [i + (number - (len(present) - 1) / 2) * height for i in range(len(shown))]
        shares = [100 * (row["share"].get(name) or 0) for row in shown]
        axes.barh(places, shares, height=0.9 * height, color=color, label=label, zorder=2)
        for place, percent in zip(places, shares, strict=True):
            if percent:
                axes.text(
                    percent + 0.8, place, f"{percent:.0f}", va="center", fontsize=6, color=INK
                )
    axes.axvline(100, color=INK, linestyle=":", linewidth=1.2, zorder=3)
    axes.set_yticks(range(len(shown)), [_layer(row) for row in shown])
    axes.invert_yaxis()
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("% of the roofline", fontsize=8, color=SOFT_INK)
    axes.tick_params(labelsize=7, labelcolor=INK)
    axes.grid(axis="x", color=GRID, linewidth=0.5, alpha=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK, fontsize=8)
    return figure


def _layer(row: Mapping[str, Any]) -> str:
    bound = f", {row['bound']}-bound" if row["bound"] else ""
    return f"{row['network']} {row['layer']}, batch {row['batch']}{bound}"
