"""Measure a network's conversion time, file size, load time, and memory at batch 1.

    python benchmarks/footprint.py > benchmarks/results/footprint-NAME.json

Each figure is the median of three new processes. Memory is the increase of the process's peak
memory, from before the network is loaded or built until after two runs: weights, feature maps and
modules imported for them, but not PyTorch itself.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NETWORK = "imagenet/resnet18_1w1a"

# Each prints one JSON object; `path` and `name` are set before it.
START = """
import json, pathlib, resource, sys, time
import torch, biper_engine
from torch.nn import functional as F
from biper_engine.cli.sources import random_network
path, name = sys.argv[1:]
def peak():
    # Linux hands ru_maxrss of the process that started this one on; the high-water mark is its own.
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    own = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return own[0] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
F.conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(3, 3, 3, 3))  # PyTorch's own first use
before, start = peak(), time.perf_counter()
"""
CONVERT = """
network = random_network(name)
start = time.perf_counter()
engine = biper_engine.convert(network)
seconds = time.perf_counter() - start
engine.save(path)
print(json.dumps({"convert_seconds": seconds, "float_bytes": engine.report.bytes_before}))
"""
ENGINE = """
engine = biper_engine.load(path)
seconds = time.perf_counter() - start
image = torch.zeros(1, *engine.input_shape)
engine(image), engine(image)
print(json.dumps({"load_seconds": seconds, "run_bytes": peak() - before}))
"""
FLOAT = """
network = biper_engine.models.build(name).eval()
image = torch.zeros(1, *network.input_shape)
with torch.no_grad():
    network(image), network(image)
print(json.dumps({"run_bytes": peak() - before}))
"""


def measure(code: str, path: Path) -> dict[str, float]:
    """Run a piece in three new processes and return the median of each figure."""
    runs = []
    for _ in range(3):
        command = [sys.executable, "-c", START + code, str(path), NETWORK]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout))
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def main() -> None:
    from biper_engine.bench import machine_facts

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "network.biper"
        converted, engine, plain = (measure(code, path) for code in (CONVERT, ENGINE, FLOAT))
        result: dict[str, Any] = {
            "network": NETWORK,
            "convert_seconds": round(converted["convert_seconds"], 3),
            "float_bytes": converted["float_bytes"],
            "file_bytes": path.stat().st_size,
            "load_seconds": round(engine["load_seconds"], 4),
            "run_bytes": {"float": plain["run_bytes"], "engine": engine["run_bytes"]},
            "machine": machine_facts(),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
