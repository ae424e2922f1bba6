"""The report's plots, as SVG to be put into a page. Text stays text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from biper_engine.nn import laplace_error
from biper_engine.nn.quantization import weight_wave
from biper_engine.plotting import COMPILED, ENGINE, FLOAT, GRID, INK, SOFT_INK, new_figure, title
from biper_engine.training.report.run import Run, Stage

__all__ = ["comparison", "curves", "flips", "histograms", "quantization"]

_COLORS = {1: COMPILED, 2: ENGINE}
_BINS = 40
_WIDTH = 10.0
_WAVES = {
    "periodic": "sin(w0*w)",
    "sawtooth": "sawtooth(w0*w)",
    "triangle": "triangle(w0*w)",
    "sign": "clamp(w, -1, 1)",
}


def _svg(figure: Any, name: str, label: str) -> str:
    """Return a figure as an element with a text for screen readers, and ids of its own."""
    import matplotlib

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    file = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    # The page gives the width; matplotlib's font is not on every machine.
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r"(font:[^;\"]*px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    text = re.sub(r"\n\s+", "\n", text)
    text = re.sub(r' d="[^"]*"', lambda found: _shorter(found[0]), text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _shorter(path: str) -> str:
    """Return a path with coordinates of a hundredth of a point."""
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", path)


def _quiet(axes: Any) -> None:
    axes.tick_params(labelsize=8, labelcolor=SOFT_INK)
    axes.grid(axis="y", color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)


def curves(run: Run) -> str:
    """Draw loss, accuracy and learning rate over the epochs of both stages."""
    figure = new_figure(_WIDTH, 3.3)
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, text, subtitle in (
        (loss, "Loss", "mean of the training images"),
        (accuracy, "Accuracy", "percent of images right"),
        (rate, "Learning rate", "at the end of the epoch"),
    ):
        title(axes, text, subtitle)
        _quiet(axes)
        axes.set_xlabel("epoch", fontsize=8, color=SOFT_INK)
        _epochs(axes, run)
    for stage, color in _staged(run):
        _curve(loss, run, stage, "train_loss", 1, f"stage {stage.number}", color, "-")
        _curve(accuracy, run, stage, "train_accuracy", 100, "", color, ":")
        _curve(accuracy, run, stage, "val_accuracy", 100, "", color, "-")
        _curve(rate, run, stage, "lr", 1, "", color, "-")
        _final(accuracy, run, stage, color)
    for axes in (loss, rate):
        axes.set_ylim(0, 1.06 * axes.dataLim.y1)
    _styles(figure, loss, run)
    return _svg(figure, "curves", "Loss, accuracy and learning rate by epoch, for both stages")


def _staged(run: Run) -> Iterator[tuple[Stage, str]]:
    for stage in run.stages:
        yield stage, _COLORS[stage.number]


def _offset(run: Run, stage: Stage) -> int:
    return 0 if stage.number == 1 else run.stages[0].wanted


def _epochs(axes: Any, run: Run) -> None:
    """Give the axis the epochs of the whole recipe, and a line between the stages."""
    total = sum(stage.wanted for stage in run.stages)
    axes.set_xlim(0.5, total + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.axvline(run.stages[0].wanted + 0.5, color=GRID, linewidth=1)


def _curve(
    axes: Any, run: Run, stage: Stage, key: str, factor: float, label: str, color: str, style: str
) -> None:
    points = [
        (epoch + 1 + _offset(run, stage), factor * row[key])
        for epoch, row in sorted(stage.metrics.items())
        if key in row
    ]
    if points:
        marker = "o" if len(points) < 3 else None
        axes.plot(*zip(*points, strict=True), style, color=color, label=label or None,
                  linewidth=1.6, marker=marker, markersize=3)  # fmt: skip


def _final(axes: Any, run: Run, stage: Stage, color: str) -> None:
    """Mark the accuracy that was measured at the end of a stage."""
    result = stage.result
    if result is None:
        return
    for value in (result.test_accuracy, result.validation_accuracy):
        if value is not None:
            place = stage.wanted + _offset(run, stage)
            axes.plot([place], [100 * value], "D", color=color, markersize=5, clip_on=False)
            axes.annotate(f"{100 * value:.1f}", (place, 100 * value), (-6, -11), fontsize=8,
                          textcoords="offset points", ha="right", color=color)  # fmt: skip


def _styles(figure: Any, loss: Any, run: Run) -> None:
    """Explain colours and kinds of lines, below the panels."""
    from matplotlib.lines import Line2D

    used = {name for stage in run.stages for row in stage.metrics.values() for name in row}
    kinds: list[tuple[Any, str, str]] = []
    if "train_accuracy" in used:
        kinds.append((":", "", "accuracy: training, augmented"))
    if "val_accuracy" in used:
        kinds.append(("-", "", "accuracy: validation"))
    if any(stage.result is not None for stage in run.stages):
        kinds.append(("none", "D", "accuracy: at the end of the stage"))
    styles = [
        Line2D([], [], linestyle=style, marker=marker, markersize=5, color=SOFT_INK, label=label)
        for style, marker, label in kinds
    ]
    stages, _ = loss.get_legend_handles_labels()
    figure.legend(
        handles=[*stages, *styles],
        loc="outside lower left",
        ncols=5,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )


def quantization(run: Run) -> str:
    """Draw the quantization error by layer; of a sine beside its closed form, also over b*w0."""
    figure = new_figure(_WIDTH, 3.6)
    sine = run.config.weight_binarizer == "periodic"
    if sine:
        form, layers, official = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        title(form, "Over the frequency", "the paper's measure; line: Laplace weights, closed form")
        _closed_form(form, run)
    else:
        layers, official = figure.subplots(1, 2)
    title(layers, "By layer", f"the paper's measure{'; rings: closed form' if sine else ''}")
    title(official, "By layer", "the official code's measure")
    for stage, color in _staged(run):
        places = range(1, len(stage.errors) + 1)
        found = list(stage.errors.values())
        known = [(n, one.closed_form) for n, one in enumerate(found, 1) if one.closed_form]
        if known:
            layers.plot(*zip(*known, strict=True), "o", color=color, fillstyle="none", markersize=6)
        label = f"stage {stage.number}"
        layers.plot(places, [one.error for one in found], ".-", color=color, linewidth=0.8,
                    label=label)  # fmt: skip
        official.plot(places, [one.official for one in found], ".-", color=color, linewidth=0.8)
    for axes in figure.axes:
        _quiet(axes)
        axes.set_ylim(0, 1.06 * axes.dataLim.y1)
    for axes in (layers, official):
        axes.set_xlabel("binary layer, from the input on", fontsize=8, color=SOFT_INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
    layers.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    return _svg(figure, "quantization", "Quantization error of each layer, after each stage")


def _closed_form(axes: Any, run: Run) -> None:
    frequency = run.config.frequency
    points = {
        stage.number: [(one.spread * frequency, one.error) for one in stage.errors.values()]
        for stage in run.stages
    }
    scales = [u for pairs in points.values() for u, _ in pairs if u > 0]
    low, high = min([0.05, *scales]) / 1.2, max([20.0, *scales]) * 1.2
    grid = [low * (high / low) ** (n / 200) for n in range(201)]
    axes.plot(grid, [laplace_error(u) for u in grid], color=FLOAT, linewidth=1.6)
    for stage, color in _staged(run):
        if points[stage.number]:
            axes.plot(*zip(*points[stage.number], strict=True), ".", color=color)
    axes.set_xscale("log")
    axes.set_xlabel("b*w0, with b = mean |w|", fontsize=8, color=SOFT_INK)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def flips(run: Run) -> str:
    """Draw the share of signs that change, by epoch, and by epoch and layer."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    names = next(list(stage.layers) for stage in run.stages if stage.layers)
    height = 1.1 + min(4.0, 0.12 * len(names))
    figure = new_figure(_WIDTH, 2.4 + height)
    total, every = figure.subplots(2, 1, height_ratios=(2.4, height))
    title(total, "Sign flips", "percent of all weights whose sign changed in an epoch")
    title(every, "By layer", "the same for each layer, logarithmic; rows from the input on")
    for stage, color in _staged(run):
        _curve(total, run, stage, "sign_flips", 100, f"stage {stage.number}", color, "-")
    _quiet(total)
    total.set_ylim(bottom=0)
    total.legend(frameon=False, fontsize=8, labelcolor=INK)
    wanted = sum(stage.wanted for stage in run.stages)
    shares = np.full((len(names), wanted), np.nan)
    for stage in run.stages:
        for row, name in enumerate(names):
            for one in stage.layers.get(name, []):
                shares[row, one.epoch + _offset(run, stage)] = 100 * one.flips / one.weights
    logs = np.log10(np.maximum(shares, 1e-3))
    colors = LinearSegmentedColormap.from_list("flips", ["#ffffff", ENGINE, "#0b1f4d"])
    extent = (0.5, wanted + 0.5, len(names) + 0.5, 0.5)
    image = every.imshow(logs, colors, aspect="auto", interpolation="none", extent=extent,
                         vmin=-3, vmax=2)  # fmt: skip
    bar = figure.colorbar(image, ax=every, pad=0.01, aspect=12)
    bar.set_ticks([-3, -2, -1, 0, 1, 2], labels=["0", "0.01", "0.1", "1", "10", "100 %"])
    bar.ax.tick_params(labelsize=8, length=0, labelcolor=SOFT_INK)
    bar.outline.set_visible(False)
    every.tick_params(labelsize=8, labelcolor=SOFT_INK)
    every.yaxis.get_major_locator().set_params(integer=True)
    every.set_xlabel("epoch", fontsize=8, color=SOFT_INK)
    for axes in (total, every):
        _epochs(axes, run)
    return _svg(figure, "flips", "Sign flips by epoch and layer")


def histograms(run: Run) -> str:
    """Draw how the wave of the weights is distributed in each layer, after each stage."""
    waves = {stage.number: _waves(stage) for stage in run.stages if stage.network is not None}
    names = list(next(iter(waves.values())))
    columns = 6
    rows = -(-len(names) // columns)
    # Clamped weights are far from 1: each layer has its own scale.
    clamped = run.config.weight_binarizer == "sign"
    figure = new_figure(_WIDTH, 0.6 + (1.3 if clamped else 1.15) * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for number, (name, axes) in enumerate(zip(names, panels, strict=False)):
        values = {stage: found[name] for stage, found in waves.items()}
        limit = max(float(one.abs().max()) for one in values.values()) if clamped else 1.0
        _histogram(axes, values, limit or 1.0)
        axes.set_title(f"{number + 1}  {name}", loc="left", fontsize=8, color=INK)
        if number < len(names) - columns and not clamped:
            axes.set_xticklabels(["", "", ""])
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=8,
                  labelcolor=INK)  # fmt: skip
    binarizer = _WAVES[run.config.weight_binarizer]
    return _svg(figure, "histograms", f"Histogram of {binarizer} in each layer")


def _histogram(axes: Any, values: Mapping[int, Tensor], limit: float) -> None:
    """Draw the shares of equal parts of [-limit, limit], for each stage."""
    centres = [limit * ((n + 0.5) * 2 / _BINS - 1) for n in range(_BINS)]
    for stage, found in values.items():
        shares = (torch.histc(found, _BINS, -limit, limit) / found.numel()).tolist()
        color = _COLORS[stage]
        if stage == 2:
            axes.fill_between(centres, shares, step="mid", color=color, alpha=0.35, lw=0)
        label = f"stage {stage}"
        axes.step(centres, shares, where="mid", color=color, linewidth=0.9, label=label)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.set_xticks([-limit, 0, limit], [f"{-limit:.2g}", "0", f"{limit:.2g}"])
    axes.tick_params(length=0, labelsize=8, labelcolor=SOFT_INK)
    axes.set_yticks([])
    axes.set_ylim(bottom=0)


def _waves(stage: Stage) -> dict[str, Tensor]:
    assert stage.network is not None
    found = {name: weight_wave(layer) for name, layer in stage.network.named_modules()}
    return {name: values.float() for name, values in found.items() if values is not None}


def comparison(
    key: str, series: Mapping[str, Mapping[Any, Sequence[float]]], kinds: Mapping[str, str]
) -> str:
    """Draw measurements of several runs over one setting, with all runs as dots.

    Args:
        key: the setting.
        series: for each measurement, the values of the runs by the setting's value.
        kinds: what each measurement is, for the subtitle.
    """
    figure = new_figure(_WIDTH, 3.0)
    panels = figure.subplots(1, len(series), squeeze=False).flat
    for axes, (name, found) in zip(panels, series.items(), strict=True):
        title(axes, name, kinds[name])
        _quiet(axes)
        values = list(found)
        places = _places(axes, values)
        means = [sum(runs) / len(runs) for runs in found.values()]
        axes.plot(places, means, "-", color=FLOAT, linewidth=1.2)
        for place, runs in zip(places, found.values(), strict=True):
            axes.plot([place] * len(runs), runs, "o", color=ENGINE, markersize=5)
        axes.set_xlabel(key, fontsize=8, color=SOFT_INK)
        axes.margins(y=0.15)
    return _svg(figure, "comparison", f"Measurements of the runs over {key}")


def _places(axes: Any, values: Sequence[Any]) -> list[float]:
    """Return where values lie on the axis: as numbers, in logarithms if far apart, or in turn."""
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)
    if not numbers:
        axes.set_xticks(range(len(values)), [str(one) for one in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
        return [float(one) for one in range(len(values))]
    if min(values) > 0 and max(values) >= 8 * min(values):
        axes.set_xscale("log")
        axes.minorticks_off()
    formatter: Callable[[float], str] = lambda value: f"{value:g}"  # noqa: E731
    axes.set_xticks(values, [formatter(one) for one in values])
    return [float(one) for one in values]
