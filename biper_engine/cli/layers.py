"""The table of a network's layers, as `biper convert` and `biper inspect` print it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from biper_engine import ConversionReport, LayerReport

__all__ = ["float_reasons", "layer_table"]


def layer_table(report: ConversionReport, *, sizes: bool = False) -> Table:
    """Return a table with one row per layer: what it runs on, its shape and cost.

    Args:
        report: the report of a conversion.
        sizes: the last column has the bytes of each weight, before and after; otherwise it says why
            a layer stays float, as `float_reasons` does. 80 columns have no room for both.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("runs on", no_wrap=True)
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("MMACs", justify="right", no_wrap=True)
    if sizes:
        table.add_column("bytes", justify="right", no_wrap=True)
    else:
        table.add_column("why float", overflow="fold")
    for row in report.layers:
        table.add_row(
            escape(row.name),
            "bits" if row.packed else "float",
            "x".join(map(str, row.shape)),
            f"{row.macs / 1e6:,.2f}",
            _bytes(row) if sizes else escape(row.note),
        )
    return table


def _bytes(row: LayerReport) -> str:
    before, after = -(-row.weight_bits_before // 8), -(-row.weight_bits_after // 8)
    return f"{before:,} > {after:,}" if row.packed else f"{after:,}"


def float_reasons(report: ConversionReport) -> list[str]:
    """Return a line for each reason why layers stay float."""
    names: dict[str, list[str]] = {}
    for row in report.layers:
        if not row.packed:
            names.setdefault(row.reason, []).append(row.name)
    return [f"{_listed(layers)} float: {reason}" for reason, layers in names.items()]


def _listed(names: list[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} stays"
    shown = names if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more"]
    return f"{', '.join(shown[:-1])} and {shown[-1]} stay"
