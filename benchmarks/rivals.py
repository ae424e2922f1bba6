"""Record networks beside every rival that is installed: one JSON file per network and threads.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/rivals.py --machine epyc-zen4

Each file is the output of `biper bench NETWORK --rivals --json` in a process of its own, with the
commit in front. The machine should do nothing else meanwhile: a thread that waits for another, in
turn with the threads of ten runtimes, loses more by a busy core than what is compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from recording import RESULTS, record

NETWORKS = (
    *("cifar10/resnet20_1w1a", "cifar10/resnet18_1w1a", "cifar10/vgg_small_1w1a"),
    *("imagenet/resnet18_1w1a", "imagenet/resnet34_1w1a", "imagenet/mobilenet_1w1a"),
)
MAIN = "import sys; from biper_engine.cli import main; sys.exit(main(sys.argv[1:]))"


def measure(network: str, threads: int, batches: list[int], seconds: float) -> dict[str, Any]:
    """Run `biper bench` in a process of its own and return what it printed.

    Raises:
        subprocess.CalledProcessError: it failed; what it said went to stderr.
    """
    command = [sys.executable, "-c", MAIN, "bench", network, "--rivals", "--json"]
    command += [word for batch in batches for word in ("--batch", str(batch))]
    command += ["--threads", str(threads), "--seconds", str(seconds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def summary(values: dict[str, Any]) -> list[str]:
    """Return a line per batch: each contestant's median, and how often the engine is as fast."""
    lines = []
    for contest in values["batches"]:
        ratios = contest["engine_times_as_fast"]
        cells = [
            f"{name} {taken['median_ms']:.3f} ms"
            + (f" ({ratios[name]:.2f}x)" if name in ratios else "")
            for name, taken in contest["contestants"].items()
        ]
        cells += [f"{name} did not run" for name in contest["did_not_run"]]
        lines.append(f"  batch {contest['batch']}: " + "; ".join(cells))
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--machine", required=True, help="the end of the files' names")
    parser.add_argument("--batch", type=int, action="append", help="repeatable; 1 and 8")
    parser.add_argument("--threads", type=int, action="append", help="repeatable; 1 and 2")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing for each batch")
    parser.add_argument("--into", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    failed = 0
    for network in options.networks:
        for threads in options.threads or (1, 2):
            print(f"{network}, {threads} thread{'s' * (threads != 1)}", flush=True)
            try:
                values = measure(network, threads, options.batch or [1, 8], options.seconds)
            except subprocess.CalledProcessError as error:
                print(f"  failed with exit status {error.returncode}", flush=True)
                failed += 1
                continue
            name = f"rivals-{network.replace('/', '-')}-{threads}t-{options.machine}.json"
            record(values, options.into / name)
            print("\n".join(summary(values)), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
