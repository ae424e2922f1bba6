"""Record networks and every installed rival: one JSON file per network and number of threads.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/rivals.py --machine epyc-zen4
    python benchmarks/rivals.py --machine epyc-zen4 --streams
    python benchmarks/rivals.py --machine epyc-zen4 --threads 2 --batch 1 --isa avx2

Each file is the output of `biper bench NETWORK --rivals --json`, or of `--streams`, from its own
process, after the commit. The machine should do nothing else meanwhile: with the threads of ten
runtimes in turn, waiting for a busy core costs more time than the differences to be measured. If a
contestant takes over 5 % longer in turn than alone, the machine was not in the same state all the
time, and the network is measured again, up to --tries times. The file has the try with the smallest
such disturbance, regardless of its result for the engine, and the disturbance of every try.

--isa sets an environment in which the engine, PyTorch and oneDNN, also OpenVINO's, use at most one
instruction set, for any processor. Rivals that it does not limit are named in the file, with the
kernels that show it; they must not be compared with the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from recording import RESULTS, least_disturbed, record, tries_told

NETWORKS = (
    *("cifar10/resnet20_1w1a", "cifar10/resnet18_1w1a", "cifar10/vgg_small_1w1a"),
    *("imagenet/resnet18_1w1a", "imagenet/resnet34_1w1a", "imagenet/mobilenet_1w1a"),
)
ISAS = {
    "avx2": {
        "BIPER_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",  # ATen's kernels, and the code from Inductor
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
}
FAILURES = (subprocess.CalledProcessError, RuntimeError)
WIDER = "avx512"  # part of the names of OpenVINO's kernels
MAIN = "import sys; from biper_engine.cli import main; sys.exit(main(sys.argv[1:]))"


def beyond(values: dict[str, Any], isa: str) -> dict[str, str]:
    """Return the rivals that the environment does not limit to `isa`, each with the evidence.

    Raises:
        RuntimeError: the engine or PyTorch is not limited to `isa`.
    """
    machine = values["machine"]
    ours, torchs = machine.get("cpu_backend", "no cpu backend"), machine["torch_cpu_capability"]
    if not ours.startswith(f"{isa},") or torchs.lower() != isa:
        raise RuntimeError(f"{isa} was requested, but the engine has {ours}, PyTorch {torchs}")
    found = {}
    for contest in values["batches"]:
        for name in contest["contestants"]:
            kernels = contest["kernels"].get(name, {})
            wider = [f"{count} x {kernel}" for kernel, count in kernels.items() if WIDER in kernel]
            if wider:
                found[name] = ", ".join(wider)
            elif name.startswith("ONNX Runtime"):
                found[name] = "ONNX Runtime takes what the processor has; it has no setting"
    return found


def measure(network: str, words: list[str], isa: str | None) -> dict[str, Any]:
    """Run `biper bench` in its own process and return its output.

    Raises:
        subprocess.CalledProcessError: it failed; its messages went to stderr.
        RuntimeError: as for `beyond`.
    """
    command = [sys.executable, "-c", MAIN, "bench", network, "--json", *words]
    environment = {**os.environ, **ISAS.get(isa, {})}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    values: dict[str, Any] = json.loads(done.stdout)
    if isa is not None:
        values = {"isa": isa, "beyond_the_isa": beyond(values, isa), **values}
    return values


def attempts(run: Callable[[], dict[str, Any]], most: int) -> Iterator[dict[str, Any]]:
    """Yield the values of one to `most` runs; stop at one that fails, unless it is the first.

    Raises:
        subprocess.CalledProcessError, RuntimeError: the first run failed.
    """
    yield run()
    for number in range(2, most + 1):
        try:
            values = run()
        except FAILURES as error:
            print(f"  try {number} failed, the tries before it count: {error}", flush=True)
            return
        yield values


def summary(values: dict[str, Any]) -> list[str]:
    """Return a line per batch: each contestant's median, and the engine's speedup over it."""
    lines = []
    for contest in values["batches"]:
        best = {name: program for program, name in contest.get("best", {}).items()}
        cells = []
        for name, taken in contest["contestants"].items():
            ratio = contest["engine_times_as_fast"].get(best.get(name, name))
            cells.append(f"{name} {amount(taken)}" + (f" ({ratio:.2f}x)" if ratio else ""))
        cells += [f"{name} did not run" for name in contest["did_not_run"]]
        lines.append(f"  batch {contest['batch']}: " + "; ".join(cells))
    lines += tries_told(values)
    lines += [f"  beyond: {name}, {why}" for name, why in values.get("beyond_the_isa", {}).items()]
    return lines


def amount(taken: dict[str, Any]) -> str:
    if "median_ms" in taken:
        return f"{taken['median_ms']:.3f} ms"
    return (
        f"{taken['median_images_per_second']:,.0f} images/s "
        f"on {taken['processors_used']:.1f} processors"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--machine", required=True, help="the end of the files' names")
    parser.add_argument(
        "--batch", type=int, action="append", help="repeatable; 1 and 8, with --streams 1"
    )
    parser.add_argument(
        "--threads", type=int, action="append", help="repeatable; 1 and 2, with --streams all"
    )
    parser.add_argument("--seconds", type=float, help="time for each batch; 20, with --streams 60")
    parser.add_argument(
        "--streams", action="store_true", help="images per second, several calls at once"
    )
    parser.add_argument("--tries", type=int, default=3, help="most runs, see above; 3")
    parser.add_argument("--isa", choices=ISAS, help="widest instruction set of contestants")
    parser.add_argument("--into", type=Path, default=RESULTS)
    return parser.parse_args()


def runs(options: argparse.Namespace) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the network, the file name and the arguments of `biper bench` for each run."""
    kind = "--streams" if options.streams else "--rivals"
    batches = options.batch or ([1] if options.streams else [1, 8])
    seconds = options.seconds or (60.0 if options.streams else 20.0)
    common = [kind, "--seconds", str(seconds)]
    common += [word for batch in batches for word in ("--batch", str(batch))]
    isa = [options.isa] if options.isa else []
    for network in options.networks:
        for threads in options.threads or ([None] if options.streams else [1, 2]):
            given = [] if threads is None else [f"{threads}t"]
            words = [] if threads is None else ["--threads", str(threads)]
            parts = [kind.strip("-"), network.replace("/", "-"), *given, *isa, options.machine]
            yield network, "-".join(parts) + ".json", common + words


def main() -> int:
    options = arguments()
    options.into.mkdir(parents=True, exist_ok=True)
    failed = 0
    for network, name, words in runs(options):
        print(name, flush=True)
        try:
            values = least_disturbed(
                attempts(partial(measure, network, words, options.isa), options.tries)
            )
        except FAILURES as error:
            print(f"  failed: {error}", flush=True)
            failed += 1
            continue
        record(values, options.into / name)
        print("\n".join(summary(values)), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
