"""Print the tables of docs/networks.md and docs/results.md, in Markdown.

    python docs/tables.py

tests/test_docs.py holds the pages to them.
"""

import json
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import biper_engine
from biper_engine.models import registry

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks/results"
FOOTPRINT = RESULTS / "footprint-epyc-zen4.json"
PUBLISHED = RESULTS / "published-xeon.json"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> list[str]:
    return [row(*cells), row("---", *["--:"] * (len(cells) - 1))]


def network(name: str) -> str:
    """Return the row of one network, which is converted to find out."""
    entry = registry.architecture(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", biper_engine.UnconvertedWarning)
        report = biper_engine.convert(biper_engine.models.build(name), check=False).report
    binary = sum(layer.binary_weight for layer in report.layers)
    top1 = entry.reported_top1
    return row(
        f"`{name}`",
        f"{report.packed} of {binary}",
        f"{report.binary_macs / 1e6:,.1f} M",
        f"{report.float_macs / 1e6:,.1f} M",
        f"{report.bytes_before:,}",
        f"{report.bytes_after:,}",
        f"{report.bytes_before / report.bytes_after:.1f}x",
        "not reported" if top1 is None else f"{top1:.2f} %",
    )


def networks() -> str:
    """Return the table of BiPer's networks."""
    columns = (
        "binary layers packed",
        "MACs on bits",
        "MACs in float",
        "float bytes",
        "engine bytes",
    )
    lines = head("network", *columns, "smaller by", "top-1 as reported")
    names = biper_engine.models.available()
    biper = [name for name in names if registry.architecture(name).frequency is not None]
    return "\n".join([*lines, *map(network, biper)])


def published() -> str:
    """Return the table of the networks of other papers, measured by benchmarks/published.py."""
    columns = (
        "layers on bits",
        "MACs on bits",
        "MACs in float",
        "float bytes",
        "file",
        "one image",
    )
    lines = head("network", *columns, "faster than `torch.compile` by", "published top-1", "source")
    measured = json.loads(PUBLISHED.read_text(encoding="utf-8"))["networks"]
    for name, found in measured.items():
        entry, times = registry.architecture(name), found["contestants"]
        top1 = entry.reported_top1
        lines.append(
            row(
                f"`{name}`",
                str(found["packed"]),
                *(f"{found[macs] / 1e6:,.1f} M" for macs in ("binary_macs", "float_macs")),
                *(f"{found[size]:,}" for size in ("float_bytes", "file_bytes")),
                f"{times['engine']['median_ms']:.2f} ms",
                f"{found['engine_times_as_fast']['float, torch.compile']:.1f}x",
                "not reported" if top1 is None else f"{top1:.1f} %",
                entry.source,
            )
        )
    return "\n".join(lines)


def footprint() -> str:
    """Return the table of what was measured by benchmarks/footprint.py."""
    measured: dict[str, Any] = json.loads(FOOTPRINT.read_text(encoding="utf-8"))
    lines = head(measured["network"], "float network", "engine")
    rows = {
        "converted, compared with the network": ("", f"{measured['convert_seconds']:.1f} s"),
        "file": (f"{measured['float_bytes']:,} bytes", f"{measured['file_bytes']:,} bytes"),
        "loaded from a file": ("", f"{measured['load_seconds']:.3f} s"),
        "memory of a batch-1 run": tuple(
            f"{measured['run_bytes'][who] / 2**20:.0f} MiB" for who in ("float", "engine")
        ),
    }
    return "\n".join([*lines, *(row(name, *cells) for name, cells in rows.items())])


def card(name: str) -> str:
    """Return the card of a trained network that comes with the package."""
    found = biper_engine.models.card(name)
    rows = {
        "network": f"`{found.architecture}`, {found.packed} of {found.layers} layers on bits",
        "data": found.data,
        "licence of the data": found.data_licence,
        "intended use": found.intended_use,
        "accuracy": f"{found.accuracy:.2%} of {found.test_images:,} test images",
        "classes": ", ".join(found.classes),
        "file": f"{found.bytes:,} bytes; {found.float_bytes:,} in float",
        "latency": str(found.latency),
        "verified": found.verified,
        "training": f"{found.seconds:,.0f} s",
    }
    lines = [row(f"`{name}`", ""), row("---", "---")]
    return "\n".join([*lines, *(row(*cells) for cells in rows.items())])


def cards() -> str:
    """Return all cards."""
    return "\n\n".join(map(card, biper_engine.models.shipped()))


def recorded(name: str) -> list[dict[str, Any]]:
    """Return the runs that benchmarks/training_runs.py recorded under a name."""
    paths = RESULTS.glob(f"training-{name}-*.json")
    (path,) = (p for p in paths if p.stem.rpartition("-")[0] == f"training-{name}")
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return runs


def kind(run: dict[str, Any]) -> str:
    """Say what a run trained."""
    if run["changes"].get("architecture") == "cifar10/resnet20":
        return "float twin"
    return f"binary, {run['changes'].get('weight_binarizer', 'periodic')}"


def accuracies(name: str) -> str:
    """Return the table of test accuracies: a row for each kind of network, over its seeds."""
    lines = head("trained", "seeds", "stage 1", "stage 2", "lowest and highest", "spread")
    kinds: dict[str, list[tuple[float, float]]] = {}
    for run in recorded(name):
        first, second = (stage["test_accuracy"] for stage in run["stages"])
        kinds.setdefault(kind(run), []).append((first, second))
    for told, found in kinds.items():
        first, second = (list(values) for values in zip(*found, strict=True))
        spread = f"{100 * stdev(second):.2f}" if len(second) > 1 else "-"
        ends = f"{min(second):.2%}, {max(second):.2%}" if len(second) > 1 else "-"
        means = (f"{mean(values):.2%}" for values in (first, second))
        lines.append(row(told, str(len(second)), *means, ends, spread))
    return "\n".join(lines)


def errors(name: str) -> str:
    """Return the table of quantization errors after stage 2: a row for each frequency."""
    lines = head("w0", "paper's measure", "closed form", "official code's", "accuracy")
    runs = {run["changes"].get("frequency", 10.0): run["stages"][1] for run in recorded(name)}
    for frequency, last in sorted(runs.items()):
        measures = ("", "_closed_form", "_official")
        cells = (f"{last[f'quantization_error{measure}']:.4f}" for measure in measures)
        lines.append(row(f"{frequency:g}", *cells, f"{last['test_accuracy']:.2%}"))
    return "\n".join(lines)


def steps(name: str) -> str:
    """Return the table of what benchmarks/training_step.py recorded: a row for each way."""
    lines = head(name, "float twin", "stage 1", "stage 2")
    for path in sorted(RESULTS.glob("training_step-*.json")):
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        way, _ = path.stem.removeprefix("training_step-").rsplit("-", 1)
        times = {who: found["median_ms"] for who, found in held["contestants"].items()}
        twin = times["float twin"]
        ratios = (f"{times[stage] / twin:.2f}x" for stage in ("stage 1", "stage 2"))
        lines.append(row(way.replace("-", ", "), f"{twin / held['batch']:.2f} ms", *ratios))
    return "\n".join(lines)


if __name__ == "__main__":
    print(networks(), published(), footprint(), cards(), sep="\n\n")
    for path in sorted(RESULTS.glob("training-*.json")):
        name = path.name.removeprefix("training-").rpartition("-")[0]
        print("", name, (errors if name == "frequency" else accuracies)(name), sep="\n")
    print("", steps("step"), sep="\n")
