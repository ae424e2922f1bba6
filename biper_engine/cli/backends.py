"""`biper backends`: what can run here, and why the rest cannot."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from biper_engine.cli.console import print_json, results

__all__ = ["backends"]


def backends(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """List the backends in order of preference, and why one cannot run here.

    BIPER_BACKEND forces one, BIPER_CPU_ISA an instruction set of the CPU,
    BIPER_NUM_THREADS a number of threads.

    [bold]Examples[/bold]
    biper backends
    BIPER_CPU_ISA=avx2 biper backends --json
    """
    import biper_engine

    rows = [
        {
            "name": info.name,
            "available": info.available,
            "reason": info.reason,
            "details": _details(info.name) if info.available else None,
        }
        for info in biper_engine.backends()
    ]
    first = _runs_cpu_tensors()
    if json_output:
        print_json({"backends": rows, "cpu_tensors_run_on": first})
        return
    console = results()
    console.print(_table(rows))
    console.print(f"CPU tensors run on: {first}", markup=False)
    if first == "reference":
        console.print(
            "The reference backend is there to be right: it is many times slower than the others.",
            markup=False,
        )


def _details(name: str) -> str | None:
    if name == "cpu":
        from biper_engine.ops.cpu import description

        return description()
    return "plain PyTorch, the definition of every result" if name == "reference" else None


def _runs_cpu_tensors() -> str:
    import torch

    from biper_engine.ops.backends import select

    return select("binarize", None, torch.device("cpu")).name


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("backend")
    table.add_column("runs here")
    table.add_column("", overflow="fold")
    for row in rows:
        said = row["details"] or row["reason"] or ""
        table.add_row(row["name"], "yes" if row["available"] else "no", escape(said))
    return table
