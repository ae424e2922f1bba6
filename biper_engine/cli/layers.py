"""The table of a network's layers, as `biper convert` and `biper inspect` print it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from biper_engine import ConversionReport

__all__ = ["layer_table"]


def layer_table(report: ConversionReport, *, sizes: bool = False) -> Table:
    """Return one row per layer: what it runs on, its shape and cost, and why it stays float.

    Args:
        report: of a conversion.
        sizes: also print the bytes of each weight before and after.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("runs on")
    table.add_column("weight", justify="right")
    table.add_column("MMACs", justify="right")
    if sizes:
        table.add_column("bytes", justify="right")
    table.add_column("why float", overflow="fold")
    for row in report.layers:
        before, after = -(-row.weight_bits_before // 8), -(-row.weight_bits_after // 8)
        table.add_row(
            escape(row.name),
            "bits" if row.packed else "float",
            "x".join(map(str, row.shape)),
            f"{row.macs / 1e6:,.2f}",
            *([f"{before:,} > {after:,}" if row.packed else f"{after:,}"] if sizes else []),
            escape(row.reason),
        )
    return table
