"""Print the tables of docs/speed.md and the README, in Markdown, from the recorded results.

    python benchmarks/tables.py

tests/test_docs.py and tests/test_readme.py compare the pages with them.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
NETWORKS = {
    "resnet20": "cifar10/resnet20_1w1a",
    "resnet18": "cifar10/resnet18_1w1a",
    "vgg_small": "cifar10/vgg_small_1w1a",
    "imagenet-resnet18": "imagenet/resnet18_1w1a",
}
# Names in files and in the table; each is a line in a cell.
DEPLOYED = {
    "OpenVINO binary f32": "OpenVINO binary",
    "OpenVINO int8": "OpenVINO int8",
    "OpenVINO f32": "OpenVINO float32",
    "ONNX Runtime int8": "ONNX Runtime int8",
    "torch.compile bf16": "`torch.compile` bfloat16",
}
# The same for files of streams, at their best, and for files of AVX2.
STREAMS = {
    "OpenVINO binary f32": "OpenVINO binary",
    "OpenVINO int8": "OpenVINO int8",
    "ONNX Runtime int8": "ONNX Runtime int8",
}
AVX2 = {
    "OpenVINO int8": "OpenVINO int8",
    "OpenVINO f32": "OpenVINO float32",
    "float, eager": "eager",
    "float, torch.compile": "`torch.compile`",
}
ONE_THREAD = (*NETWORKS.values(), "imagenet/resnet34_1w1a", "imagenet/mobilenet_1w1a")
IN_README = ("resnet20", "resnet18", "imagenet-resnet18")
# Channels of a group, inputs and outputs, in the table of grouped layers.
GROUPED = (4, 8, 16, 32)
LAYERS = ("64@56", "128@28", "256@14", "512@7")
RIVALS = ("float, eager", "float, torch.compile")


def read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return values


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def networks() -> str:
    """Return the table of whole networks: a row per network and batch size."""
    lines = [
        row("network", "batch", "eager", "`torch.compile`", "engine", "faster than them by"),
        row("---", "--:", "--:", "--:", "--:", "--:"),
    ]
    for name, network in NETWORKS.items():
        for contest in read(f"{name}-epyc-zen4.json")["batches"]:
            taken, ratios = contest["contestants"], contest["engine_times_as_fast"]
            lines.append(
                row(
                    f"`{network}`",
                    str(contest["batch"]),
                    *(f"{taken[who]['median_ms']:.2f} ms" for who in (*RIVALS, "engine")),
                    ", ".join(f"{ratios[rival]:.1f}x" for rival in RIVALS),
                )
            )
    return "\n".join(lines)


def in_readme() -> str:
    """Return the README's table: some of these networks with one image."""
    lines = [
        row("network", "eager", "`torch.compile`", "engine", "faster than them by"),
        row("---", "--:", "--:", "--:", "--:"),
    ]
    for name in IN_README:
        contest = read(f"{name}-epyc-zen4.json")["batches"][0]
        taken, ratios = contest["contestants"], contest["engine_times_as_fast"]
        times_ms = (f"{taken[who]['median_ms']:.2f} ms" for who in (*RIVALS, "engine"))
        faster = ", ".join(f"{ratios[rival]:.1f}x" for rival in RIVALS)
        lines.append(row(f"`{NETWORKS[name]}`", *times_ms, faster))
    return "\n".join(lines)


def outside() -> str:
    """Return the time outside steps in a call of small networks with one image."""
    cells = [
        f"{1e3 * read(f'{name}-epyc-zen4.json')['profiles'][0]['outside_ms']:.0f} us "
        f"(`{network.partition('/')[2]}`)"
        for name, network in NETWORKS.items()
        if network.startswith("cifar10/")
    ]
    return f"{', '.join(cells[:-1])} and {cells[-1]}"


def deployed(networks: Iterable[str] = tuple(NETWORKS.values()), threads: int = 2) -> str:
    """Return the table of other programs: their times, also as multiples of ours."""
    lines = [
        row("network", "batch", "engine", *DEPLOYED.values()),
        row("---", *["--:"] * (len(DEPLOYED) + 2)),
    ]
    for network in networks:
        values = read(f"rivals-{network.replace('/', '-')}-{threads}t-epyc-zen4.json")
        lines += [row(f"`{network}`", *cells) for cells in times(values, DEPLOYED)]
    return "\n".join(lines)


def one_thread() -> str:
    """Return the same table for one thread, with more networks."""
    return deployed(ONE_THREAD, 1)


def grouped() -> str:
    """Return the table of grouped 3x3 layers on a Xeon, on bits and in float."""
    lines = [
        row("channels of a group", "AVX-512, bits", "float", "AVX2, bits", "float"),
        row("--:", *["--:"] * 4),
    ]
    files = [read(name)["rows"] for name in ("grouped-xeon.json", "grouped-avx2-xeon.json")]
    for channels in GROUPED:
        cells = []
        for rows in files:
            (found,) = [one for one in rows if _is_grouped(one, channels)]
            cells += [f"{found['bits_us']:,.0f} us", f"{found['float_us']:,.0f} us"]
        lines.append(row(str(channels), *cells))
    return "\n".join(lines)


def _is_grouped(measured: dict[str, Any], channels: int) -> bool:
    return (measured["inputs"], measured["outputs"], measured["kernel"]) == (channels, channels, 3)


def recorded(pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each network whose file exists, with the file; {} in `name` is the network."""
    for network in NETWORKS.values():
        name = pattern.format(network.replace("/", "-"))
        if (RESULTS / name).exists():
            yield network, read(name)


def streams() -> str:
    """Return the table of images per second with several calls at once."""
    lines = [
        row("network", "images per call", "engine", *STREAMS.values()),
        row("---", *["--:"] * (len(STREAMS) + 2)),
    ]
    for network, values in recorded("streams-{}-epyc-zen4.json"):
        for contest in values["batches"]:
            taken, best = contest["contestants"], contest["best"]
            cells = [
                f"{taken[best[program]]['median_images_per_second']:,.0f}, "
                f"{contest['engine_times_as_fast'][program]:.1f}x"
                for program in STREAMS
            ]
            engine = f"{taken['engine']['median_images_per_second']:,.0f}"
            lines.append(row(f"`{network}`", str(contest["batch"]), engine, *cells))
    return "\n".join(lines)


def avx2() -> str:
    """Return the table of contestants that use at most AVX2, without those that cannot be limited.

    Raises:
        ValueError: a rival of the table went beyond AVX2.
    """
    lines = [
        row("network", "batch", "engine", *AVX2.values()),
        row("---", *["--:"] * (len(AVX2) + 2)),
    ]
    for network, values in recorded("rivals-{}-2t-avx2-epyc-zen4.json"):
        wider = set(AVX2) & set(values["beyond_the_isa"])
        if wider:
            raise ValueError(f"{network}: {', '.join(sorted(wider))} went beyond AVX2")
        lines += [row(f"`{network}`", *cells) for cells in times(values, AVX2)]
    return "\n".join(lines)


def times(values: dict[str, Any], rivals: Iterable[str]) -> Iterator[list[str]]:
    """Yield cells for each batch: its size, the engine's time, times and ratios of rivals.

    A rival that was not measured has "-".
    """
    for contest in values["batches"]:
        taken, ratios = contest["contestants"], contest["engine_times_as_fast"]
        cells = [
            f"{taken[who]['median_ms']:.2f}, {ratios[who]:.1f}x" if who in taken else "-"
            for who in rivals
        ]
        yield [str(contest["batch"]), f"{taken['engine']['median_ms']:.2f}", *cells]


def layers() -> str:
    """Return the table of single layers: a row per layer, called in turn with F.conv2d."""
    lines = [
        row("layer", "`F.conv2d`", "on bits", "faster by", "kernel", "of the peak", "bits only"),
        row("---", *["--:"] * 6),
    ]
    found = {
        entry["extra_info"]["layer"]: entry["extra_info"]
        for entry in read("layers-epyc-zen4.json")["benchmarks"]
    }
    for name in LAYERS:
        info = found[name]
        lines.append(
            row(
                f"3x3, {name.partition('@')[0]} channels at {name.partition('@')[2]}x"
                f"{name.partition('@')[2]}",
                f"{1e3 * info['float_conv2d']['median_ms']:,.0f} us",
                f"{1e3 * info['engine_in_turn']['median_ms']:,.0f} us",
                f"{info['times_as_fast_as_conv2d']:.1f}x",
                f"{info['kernel']['fused']['median_us']:,.0f} us",
                *(
                    f"{info['kernel'][kind]['share_of_popcount_peak']:.0%}"
                    for kind in ("fused", "bits_only")
                ),
            )
        )
    return "\n".join(lines)


def peak() -> str:
    """Return the popcount peak of the machine on which the layers were measured."""
    entry = read("layers-epyc-zen4.json")["benchmarks"][0]["extra_info"]["popcount_peak"]
    return (
        f"{entry['macs_per_second'] * 1e-9:,.0f} G multiply-accumulates per second and core, or "
        f"{entry['macs_per_clock']:.0f} per clock"
    )


if __name__ == "__main__":
    tables = (networks, outside, deployed, one_thread, streams, avx2, grouped, layers, peak)
    print(*(table() for table in (*tables, in_readme)), sep="\n\n")
