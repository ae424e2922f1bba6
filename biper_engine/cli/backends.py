"""`biper backends`: list what can run here, and why the rest cannot."""

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
    from biper_engine.ops.backends import forced_name

    rows = [
        {
            "name": info.name,
            "available": info.available,
            "reason": info.reason,
            "details": _details(info.name) if info.available else None,
        }
        for info in biper_engine.backends()
    ]
    runs = {device: _runs(device) for device in ("cpu", "cuda")}
    if json_output:
        answers = {f"{device}_tensors_run_on": name for device, (name, _) in runs.items()}
        reasons = {f"{device}_reason": reason for device, (_, reason) in runs.items()}
        print_json({"backends": rows, "forced": forced_name(), **answers, **reasons})
        return
    console = results()
    console.print(_table(rows))
    for line in _lines(rows, runs, forced_name()):
        console.print(line, markup=False)


def _details(name: str) -> str | None:
    if name == "cpu":
        from biper_engine.ops.cpu_processor import description

        return description()
    if name == "cuda":
        from biper_engine.ops.cuda import description as devices

        return devices()
    return "plain PyTorch, the definition of every result" if name == "reference" else None


def _runs(device: str) -> tuple[str | None, str | None]:
    """Return the backend that runs tensors on a device; or None, and why none does."""
    import torch

    from biper_engine.errors import BackendUnavailableError
    from biper_engine.ops.backends import select

    if device == "cuda" and not torch.cuda.is_available():
        return None, "PyTorch finds no CUDA device here."
    try:
        return select("binarize", None, torch.device(device)).name, None
    except BackendUnavailableError as error:
        return None, str(error)


def _lines(
    rows: list[dict[str, Any]],
    runs: dict[str, tuple[str | None, str | None]],
    forced: str | None,
) -> list[str]:
    lines = [f"BIPER_BACKEND forces: {forced}"] if forced is not None else []
    for device, (name, reason) in runs.items():
        lines.append(f"{device.upper()} tensors run on: {name or f'nothing. {reason}'}")
    missing = next((row["reason"] for row in rows if row["name"] == "cpu"), None)
    if missing is not None:
        lines += [
            f"The cpu backend is missing: {missing}.",
            "The reference backend defines the results: it is many times slower than the others.",
        ]
    return lines


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("backend")
    table.add_column("runs here")
    table.add_column("", overflow="fold")
    for row in rows:
        said = row["details"] or row["reason"] or ""
        table.add_row(row["name"], "yes" if row["available"] else "no", escape(said))
    return table
