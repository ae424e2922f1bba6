"""Tables and plots of the results that a check has recorded so far, in its last run.

PYTHONPATH=.:benchmarks python -m gpu.report [FOLDER]
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from biper_engine.files import write_atomically
from gpu.layers import floor_s
from gpu.record import file_results, read

TEXT, RATES, ROOFLINE = "report.txt", "gpu-images-per-second.png", "gpu-roofline.png"
BEST, RIVAL = "cuda float16", "compile float16"
CONTESTANTS = (
    *("cuda float16", "cuda float32", "triton float16", "triton float32"),
    *("eager float16", "compile float16"),
)
PEAKS = {
    "copy_bytes": ("copy, read and written", 1e-9, "GB/s"),
    "l2_copy_bytes": ("copy within L2", 1e-9, "GB/s"),
    "binary_macs": ("1-bit mma.sync", 2e-12, "TOPS"),
    "popcount_macs": ("popcount", 2e-12, "TOPS"),
    "int8_macs": ("int8 mma.sync", 2e-12, "TOPS"),
    "float_mma_macs": ("float16 mma.sync", 2e-12, "TFLOP/s"),
    "float_macs": ("large float16 product", 2e-12, "TFLOP/s"),
    "launches": ("kernels of a CUDA graph", 1e-3, "thousand/s"),
}
# The counters of ncu in the report; the lines have all counters.
COUNTERS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "units %",
    "sm__inst_executed.avg.per_cycle_active": "instructions/clock",
    "smsp__inst_executed.sum": "instructions",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
}
Lines = Sequence[Mapping[str, Any]]


# -- rows -----------------------------------------------------------------------------------------


def of_kind(lines: Lines, *kinds: str) -> list[Mapping[str, Any]]:
    return [line for line in lines if line["kind"] in kinds]


def contests(lines: Lines) -> list[dict[str, Any]]:
    """Return each contest: medians in ms of all contestants in turn, in a graph and alone."""
    samples: dict[tuple[Any, ...], dict[str, dict[str, list[float]]]] = {}
    for line in of_kind(lines, "time", "call"):
        key = (line["network"], line["batch"], line["step"])
        one = samples.setdefault(key, {"time": {}, "call": {}})
        one[line["kind"]].setdefault(line["who"], []).extend(line["ms"])
    return [
        {"network": network, "batch": batch, "step": step}
        | {kind: {who: statistics.median(ms) for who, ms in one[kind].items()} for kind in one}
        for (network, batch, step), one in samples.items()
    ]


def layers(lines: Lines) -> list[dict[str, Any]]:
    """Return each layer and batch: medians in ms by backend, its floor, and the floor's share."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    rates = {line["name"]: line["rate"] for line in of_kind(lines, "ceiling") if "rate" in line}
    rates["l2_bytes"] = next((line["l2_bytes"] for line in of_kind(lines, "machine")), 0)
    for line in of_kind(lines, "layer"):
        where = {name: line[name] for name in ("layer", "batch")}
        floor = floor_s(line["work"], rates)
        row = rows.setdefault(
            tuple(where.values()),
            where | {"ms": {}, "share": {}, "floor_ms": floor and 1e3 * floor[0]},
        )
        row["bound"] = floor[1] if floor else ""
        ms = row["ms"][line["who"]] = statistics.median(line["ms"])
        if floor and line["who"] != "float16":
            row["share"][line["who"]] = row["floor_ms"] / ms
    return list(rows.values())


# -- tables ---------------------------------------------------------------------------------------


def aligned(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a title and rows with aligned columns, the first to the left; [] without rows."""
    if len(rows) < 2:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    return [title, *("  ".join(line).rstrip() for line in lines)]


def number(amount: float | None, factor: float = 1.0, form: str = ",.0f") -> str:
    return "-" if amount is None else format(factor * amount, form)


def tables(lines: Lines) -> str:
    """Return all results as text, the most important ones last."""
    makers = (_machine, _steps, _remarks, _tests, _ceilings, _counters, _layers)
    parts = [*(make(lines) for make in makers), *_networks(contests(lines))]
    return "\n\n".join("\n".join(part) for part in parts if part) or "Nothing was recorded."


def _machine(lines: Lines) -> list[str]:
    machines = of_kind(lines, "machine")
    told = [f"{one['gpu']}, torch {one['torch']}, commit {one['commit']}" for one in machines]
    if any(run["rehearsal"] for run in of_kind(lines, "run")):
        told.append("A REHEARSAL on an emulator, with small networks: no time here means anything.")
    return told


def _steps(lines: Lines) -> list[str]:
    return [
        f"{line['name']:<13} {line['verdict']:<8} {line['seconds']:6.1f} s  {line['told'][:200]}"
        for line in of_kind(lines, "step")
    ]


def _remarks(lines: Lines) -> list[str]:
    told = []
    for line in of_kind(lines, "refused", "check", "contender"):
        keys = ("step", "network", "layer", "batch", "who")
        what = " ".join(str(line[key]) for key in keys if key in line)
        if line["kind"] == "refused":
            told.append(f"{what} was not timed: {line['reason']}")
        elif line["kind"] == "check":
            agreed, tried = line.get("images", (0, 0))
            text = f"{what}: {line['operators']} operators beside the reference"
            text += f", {agreed} of {tried} images agree" if tried else ""
            told.append(text + (f"; WRONG: {', '.join(line['wrong'])}" if line["wrong"] else ""))
        elif "compile_s" in line:
            off = f"{line['difference']:.1e} from eager"
            told.append(f"{what}: compiled in {line['compile_s']:.0f} s, {off}")
        elif not line.get("execution", "one CUDA graph").startswith("one CUDA graph"):
            told.append(f"{what} runs {line['execution']}")
    return told


def _tests(lines: Lines) -> list[str]:
    rows, told = [["tests", "passed", "failed", "skipped"]], []
    for one in file_results(lines):
        name = " ".join(filter(None, [one.file, *one.whose]))
        counts = (one.passed, len(one.failed), sum(one.skipped.values()))
        rows.append([name, *map(str, counts)])
        told += [f"FAILED {name} {test}" for test in one.failed]
        told += [f"skipped: {name}: {count} x {why}" for why, count in one.skipped.items()]
        told += [f"{name}: {one.problem}"] if one.problem else []
    return [*aligned("Tests on the GPU, by file", rows), *told]


def _ceilings(lines: Lines) -> list[str]:
    told = []
    for line in of_kind(lines, "ceiling"):
        text, factor, unit = PEAKS[line["name"]]
        rate = f"{line['rate'] * factor:,.0f} {unit}" if "rate" in line else line["reason"]
        told.append(f"{text}: {rate}")
    return ["Ceilings", *told] if told else []


def _counters(lines: Lines) -> list[str]:
    rows = [["layer", *COUNTERS.values()]]
    for line in of_kind(lines, "counters"):
        found = (line["counters"].get(name) for name in COUNTERS)
        rows.append([line["layer"], *(number(amount, form=",.4g") for amount in found)])
    return aligned("Counters of ncu, without clock control", rows)


def _layers(lines: Lines) -> list[str]:
    whose = ("cuda", "triton", "float16")
    shares = ("cuda of floor", "triton of floor", "x float16")
    rows = [["layer", "batch", *(f"{who} us" for who in whose), "floor us", "bound", *shares]]
    for row in layers(lines):
        ms = row["ms"]
        ratio = ms["float16"] / ms["cuda"] if {"float16", "cuda"} <= set(ms) else None
        rows.append(
            [row["layer"], str(row["batch"])]
            + [number(ms.get(who), 1e3, ",.1f") for who in whose]
            + [number(row["floor_ms"], 1e3, ",.1f"), row["bound"] or "-"]
            + [number(row["share"].get(who), form=".0%") for who in whose[:2]]
            + [number(ratio, form=".1f")]
        )
    return aligned("Layers of ResNet-18: device time in a CUDA graph, and the floor", rows)


def _networks(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    present = [who for who in CONTESTANTS if any(who in one["time"] for one in found)]
    head = ["network", "batch", "step", *present]
    rates, calls = [[*head, f"x {RIVAL}"]], [head]
    for one in found:
        key, ms = [one["network"], str(one["batch"]), one["step"]], one["time"]
        ratio = ms[RIVAL] / ms[BEST] if {RIVAL, BEST} <= set(ms) else None
        seconds = [1e-3 * ms[who] if who in ms else None for who in present]
        cells = [number(each and one["batch"] / each) for each in seconds]
        rates.append([*key, *cells, number(ratio, form=".2f")])
        calls.append([*key, *(number(one["call"].get(who), 1e3) for who in present)])
    return [
        aligned("Networks: microseconds of a call on its own, from Python", calls),
        aligned("Networks: images per second, device time in a CUDA graph", rates),
    ]


# -- files ----------------------------------------------------------------------------------------


def write_text(out: Path) -> str:
    """Write the tables of a folder's results, completely or not at all, and return them."""
    text = tables(read(out))
    write_atomically(out / TEXT, lambda file: file.write(f"{text}\n".encode()))
    return text


def write(out: Path) -> str:
    """Write tables and plots, if there is something to show; return the text to print."""
    text, lines = write_text(out), read(out)
    if find_spec("matplotlib") is None:
        return f"{text}\n\nNo pictures: matplotlib is not installed."
    from gpu import plot

    gpu = next((one["gpu"] for one in of_kind(lines, "machine")), "an unknown GPU")
    for name, rows, draw in (
        (RATES, contests(lines), plot.rates),
        (ROOFLINE, [row for row in layers(lines) if row["share"]], plot.roofline),
    ):
        if rows:
            save = partial(draw(rows, gpu).savefig, format="png")
            write_atomically(out / name, save)
    return text


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OUT", "out"))))
