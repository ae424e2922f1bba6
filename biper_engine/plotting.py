"""The style of this package's plots: white, few lines, one blue for everything on bits."""

from __future__ import annotations

from typing import Any

__all__ = ["COMPILED", "ENGINE", "FLOAT", "GRID", "INK", "SOFT_INK", "new_figure", "title"]

FLOAT, COMPILED, ENGINE = "#9aa5b1", "#5b6b7b", "#2563eb"
INK, SOFT_INK, GRID = "#1f2933", "#52606d", "#cbd2d9"


def new_figure(width: float, height: float) -> Any:
    """Return a matplotlib figure that needs no display.

    Args:
        width: width in inches of 150 pixels.
        height: height in the same unit.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(
            f"A plot needs matplotlib, which cannot be imported: {error}. "
            'Run: pip install "biper-engine[train]"'
        ) from error

    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1, wspace=0.04)
    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def title(axes: Any, text: str, subtitle: str) -> None:
    """Put a title and a subtitle at the left of a panel, and remove its frame."""
    axes.set_title(f"{text}\n", loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=8, color=SOFT_INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0)
