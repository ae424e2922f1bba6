"""The step `report`: one JSON file, tables and pictures of what the other steps found.

    python benchmarks/gpu_report.py [results.json [FOLDER]]

Without arguments it gathers what the steps of this check left; with a file it draws that one anew.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_ceilings import lines as ceiling_lines
from gpu_machine import missing, run_folder
from gpu_roofline import Ceilings, Work, share, total

__all__ = ["SCHEMA", "gathered", "layer_rows", "network_lines", "network_rows", "tables"]

SCHEMA = 1
RESULTS, TABLES = "results.json", "report.txt"
RATE, LATENCY, ROOF = "gpu-images-per-second.png", "gpu-latency.png", "gpu-roofline.png"
BEST = "cuda float16"
RIVAL = "compile float16"
CONTESTANTS = (
    *("cuda float32", "cuda float16", "cuda bfloat16", "triton float32", "triton float16"),
    *("eager float16", "compile float16", "compile bfloat16"),
)
LINES = "networks.jsonl"
VALUES = ("machine", "build", "tests", "sanitizer", "ceilings", "layers", "networks", "digits")


def network_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a last one that was cut off is left out."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:  # its writer was stopped
            continue
    return found


def gathered(folder: Path) -> dict[str, Any]:
    """Return everything that the steps left in a folder, as the README of this folder says."""
    values: dict[str, Any] = {"schema": SCHEMA}
    for name in VALUES:
        path = folder / f"{name}.json"
        if path.exists():
            values[name] = json.loads(path.read_text(encoding="utf-8"))
    lines = folder / LINES
    found = network_lines(lines) if lines.exists() else []
    if found or "networks" in values:
        networks = values.setdefault("networks", {})
        for kind, plural in (("checks", "checks"), ("contest", "contests"), ("failed", "refused")):
            networks[plural] = [line for line in found if line["kind"] == kind]
        networks["kernels"] = _kernels(folder)
    return values


def _kernels(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the work of each converted network's kernels."""
    found = {}
    for path in sorted(folder.glob("*.kernels.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        found[entry["network"]] = entry["kernels"]
    return found


# -- rows -----------------------------------------------------------------------------------------


def layer_rows(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each layer and batch: times, ratios, and ours beside its ceiling."""
    ceilings = Ceilings.of(values.get("ceilings", {}))
    rows = []
    for contest in values.get("layers", {}).get("contests", []):
        floor = Work(**contest["work"]).floor(ceilings)
        floor_s, bound = floor if floor else (None, "")
        rows.append(
            {
                **{name: contest[name] for name in ("network", "layer", "variant", "batch", "ms")},
                "floor_ms": None if floor_s is None else 1e3 * floor_s,
                "bound": bound,
                "share": {
                    name: share(floor_s, 1e-3 * contest["ms"][name])
                    for name in ("cuda", "triton")
                    if name in contest["ms"]
                },
            }
        )
    return rows


def network_rows(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each network and batch: the contestants of all its contests together.

    A ratio to a compiled rival is of the contest in which both were called in turn.
    """
    networks = values.get("networks", {})
    ceilings = Ceilings.of(values.get("ceilings", {}))
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for contest in networks.get("contests", []):
        name, batch, taken = contest["network"], contest["batch"], contest["taken"]
        row = rows.setdefault(
            (name, batch),
            {"network": name, "batch": batch, "throughput_ms": {}, "latency_ms": {}, "faster": {}},
        )
        for who, found in taken.items():
            if _is_of(who, contest["group"]):  # others are there to be compared with
                row["throughput_ms"][who] = found["throughput_ms"]
                row["latency_ms"][who] = found["latency_ms"]
        if BEST in taken:
            ours = taken[BEST]["throughput_ms"]
            row["faster"] |= {
                who: found["throughput_ms"] / ours
                for who, found in taken.items()
                if _is_of(who, contest["group"]) and who != BEST
            }
    for (name, batch), row in rows.items():
        works = [_work(kernel, batch) for kernel in networks.get("kernels", {}).get(name, [])]
        floor_s = total(works, ceilings) if works else None
        row["floor_ms"] = None if floor_s is None else 1e3 * floor_s
        measured = row["throughput_ms"].get(BEST)
        row["share"] = None if measured is None else share(floor_s, 1e-3 * measured)
    order = list(dict.fromkeys(name for name, _ in rows))
    return sorted(rows.values(), key=lambda row: (order.index(row["network"]), row["batch"]))


def _is_of(who: str, group: str) -> bool:
    """Tell whether a contestant's figures are of the contest of a group: its own, or eager ones."""
    return who.startswith(group) or (who.startswith("eager") and group == "cuda")


def _work(kernel: Mapping[str, Any], batch: int) -> Work:
    return Work(
        nbytes=kernel["weight_bytes"] + batch * kernel["map_bytes"],
        bit_macs=batch * kernel["bit_macs"],
        grouped_bit_macs=batch * kernel["grouped_bit_macs"],
        float_macs=batch * kernel["float_macs"],
    )


# -- tables ---------------------------------------------------------------------------------------


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns, the first to the left, others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def tables(values: Mapping[str, Any]) -> str:
    """Return all that was measured as text."""
    rates, latencies = _network_tables(network_rows(values))
    parts = [_layer_table(layer_rows(values)), latencies]
    for step in ("layers", "networks"):
        for kind in ("skipped", "failed"):
            entries = values.get(step, {}).get(kind, {})
            parts.append([f"{step}, {kind}: {name}: {why}" for name, why in entries.items()])
    parts.append(_check_lines(values.get("networks", {}).get("checks", [])))
    if "ceilings" in values:
        parts.append(["Ceilings", *ceiling_lines(values["ceilings"])])
    parts.append(rates)  # last: who reads the end of it reads this
    return "\n\n".join("\n".join(part) for part in parts if part)


def _percent(amount: float | None) -> str:
    return "-" if amount is None else f"{amount:.0%}"


def _layer_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    head = ["layer", "batch", "cuda us", "triton us", "float16 us", "int8 us", "floor us", "bound"]
    cells = [[*head, "cuda of floor", "triton of floor", "x float16"]]
    for row in rows:
        ms = row["ms"]
        times = [_us(ms.get(name)) for name in ("cuda", "triton", "float16", "int8")]
        best = min((ms[name] for name in ("cuda", "triton") if name in ms), default=None)
        ratio = "-" if best is None or "float16" not in ms else f"{ms['float16'] / best:.1f}"
        shares = [_percent(row["share"].get(name)) for name in ("cuda", "triton")]
        label = f"{row['network']} {row['layer']} {row['variant']}"
        floor = [_us(row["floor_ms"]), row["bound"] or "-"]
        cells.append([label, str(row["batch"]), *times, *floor, *shares, ratio])
    return ["Layers: device time in a CUDA graph, beside the floor", *aligned(cells)]


def _us(ms: float | None) -> str:
    return "-" if ms is None else f"{1e3 * ms:,.1f}"


def _network_tables(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    if not rows:
        return [], []
    present = {who for row in rows for who in row["throughput_ms"]}
    names = [name for name in CONTESTANTS if name in present]
    rates = [["network", "batch", *names, "floor", f"{BEST} of floor", f"x {RIVAL}"]]
    latencies = [["network", "batch", *names]]
    for row in rows:
        key = [row["network"], str(row["batch"])]
        found = row["throughput_ms"]
        cells = [_rate(row["batch"], found.get(name)) for name in names]
        ratio = row["faster"].get(RIVAL)
        last = [_rate(row["batch"], row["floor_ms"]), _percent(row["share"])]
        rates.append([*key, *cells, *last, "-" if ratio is None else f"{ratio:.2f}"])
        latencies.append([*key, *(_us(row["latency_ms"].get(name)) for name in names)])
    return (
        ["Networks: images a second, calls one behind another", *aligned(rates)],
        ["Networks: microseconds of a call on its own", *aligned(latencies)],
    )


def _rate(batch: int, ms: float | None) -> str:
    return "-" if ms is None else f"{1e3 * batch / ms:,.0f}"


def _check_lines(checks: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = []
    for check in checks:
        for name, (count, wrong) in check["nodes"].items():
            told = f"{count - len(wrong)} of {count} operators equal the reference"
            lines.append(f"{check['network']}, {name}: {told}")
        for backend, (agreed, tried) in check["images"].items():
            told = f"{agreed} of {tried} images agree with the reference"
            lines.append(f"{check['network']}, {backend} float32: {told}")
        for name, (same, tried) in check["top1"].items():
            told = f"class of the exact mode on {same} of {tried} random images, weights random"
            lines.append(f"{check['network']}, {name}: {told}")
        for name, why in check["reasons"].items():
            lines.append(f"{check['network']}, {name} not timed: {why}")
    return lines


# -- the step -------------------------------------------------------------------------------------


def write(values: Mapping[str, Any], out: Path) -> list[str]:
    """Write pictures of results, where there is something to show; return what was written."""
    if missing("matplotlib"):
        return ["no pictures: matplotlib is not installed"]
    import gpu_plot

    written = []
    networks, layers = network_rows(values), layer_rows(values)
    gpu = values.get("machine", {}).get("gpu", "an unknown GPU")
    for name, rows, draw in (
        (RATE, networks, gpu_plot.rates),
        (LATENCY, networks, gpu_plot.latencies),
        (ROOF, [row for row in layers if row["share"]], gpu_plot.roofline),
    ):
        if rows:
            draw(rows, gpu).savefig(out / name)
            written.append(name)
    return written


def main(words: Sequence[str]) -> int:
    if words:
        source = Path(words[0])
        values = json.loads(source.read_text(encoding="utf-8"))
        out = Path(words[1]) if len(words) > 1 else source.parent
    else:
        values, out = gathered(run_folder()), Path(os.environ["OUT"])
        (out / RESULTS).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    text = tables(values) or "Nothing was measured."
    (out / TABLES).write_text(text + "\n", encoding="utf-8")
    print(text)
    written = ", ".join(write(values, out)) or "no picture, for want of figures"
    print(f"\n{out / RESULTS}; {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
