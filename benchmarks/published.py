"""Measure the networks of other papers: size of the file, and time of a call with one image.

    python benchmarks/published.py --machine NAME [--threads 2] [--network NAME]...

Each has random weights, on which time and size do not depend, and is compared with its engine
before it is timed. Eager, `torch.compile` and engine are called in turn. Writes

    benchmarks/results/published-MACHINE.json      all samples

from which docs/tables.py makes a table of docs/networks.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from recording import RESULTS, record

from biper_engine.bench import compare, machine_facts, torch_threads
from biper_engine.bench.timer import Budget
from biper_engine.cli.contestants import contestants, random_images
from biper_engine.cli.sources import ModelSource
from biper_engine.models import available
from biper_engine.models.registry import architecture


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--machine", required=True, help="name for the recorded file")
    parser.add_argument("--threads", type=int, default=2, help="of every contestant")
    parser.add_argument("--network", action="append", help="measure this again; repeatable")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing each network")
    parser.add_argument("--into", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.into / f"published-{options.machine}.json"
    measured = json.loads(path.read_text("utf-8"))["networks"] if options.network else {}
    for name in options.network or others():
        measured[name] = found = network(name, options.threads, options.seconds)
        times = {who: f"{taken['median_ms']:.2f} ms" for who, taken in found["contestants"].items()}
        print(name, found["file_bytes"], "bytes", times, found["checked"], flush=True)
        facts = {"machine": machine_facts(), "threads": options.threads, "networks": measured}
        record(facts, path)


def others() -> list[str]:
    """Return the binary networks of the registry that are not BiPer's."""
    entries = map(architecture, available())
    return [entry.name for entry in entries if entry.is_binary and entry.frequency is None]


def network(name: str, threads: int, seconds: float) -> dict[str, Any]:
    """Convert, compare and time one network; return JSON values."""
    with torch_threads(threads):
        pair = contestants(ModelSource(text=name), None, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.biper"
        pair.engine.save(path)
        file_bytes = path.stat().st_size
    report = pair.engine.report
    images = random_images(pair.engine, 1)
    found = compare(
        pair.engine, pair.model, [images], threads=threads, budget=Budget(seconds=seconds)
    ).to_dict()
    return {
        "packed": report.packed,
        "binary_macs": report.binary_macs,
        "float_macs": report.float_macs,
        "float_bytes": report.bytes_before,
        "file_bytes": file_bytes,
        "execution": str(pair.engine.execution),
        "checked": pair.checked,
        **found["batches"][0],
    }


if __name__ == "__main__":
    main()
