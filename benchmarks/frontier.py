"""Time alternatives: binary networks with a published accuracy on bits, and float networks.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/frontier.py --machine epyc-zen4
    python benchmarks/frontier_report.py

BiPer's ImageNet networks with a reported accuracy, ReActNet-A and BNext-T to L run on the engine,
MobileNetV3-Small and Large, EfficientNet-B0 and B3 and ResNet-50 on OpenVINO in float32, bfloat16
and int8; all are called in turn, in one run. Accuracies are the published ones of trained networks
in float32; the weights here are random, since times do not depend on them. Before anything is
timed, engines must give the bits of their float networks, and float32 must give PyTorch's logits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from efficientnet import efficientnet_b0, efficientnet_b3
from mobilenet_v3 import mobilenet_v3_large, mobilenet_v3_small
from recording import RESULTS, least_disturbed, record, tries_told
from resnet import resnet50
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from biper_engine import Engine
from biper_engine.bench import (
    TURNS,
    Budget,
    common_threads,
    in_turn_and_alone,
    machine_facts,
    torch_threads,
)
from biper_engine.bench.rivals import openvino_float_rivals, relative_difference
from biper_engine.cli.contestants import contestants
from biper_engine.cli.sources import ModelSource
from biper_engine.conversion.twin import folded_network
from biper_engine.models.registry import architecture

BINARY = {
    "BiPer ResNet-18": "imagenet/resnet18_1w1a",
    "BiPer ResNet-34": "imagenet/resnet34_1w1a",
    "ReActNet-A": "imagenet/reactnet_a",
    "BNext-T": "imagenet/bnext_tiny",
    "BNext-S": "imagenet/bnext_small",
    "BNext-M": "imagenet/bnext_middle",
    "BNext-L": "imagenet/bnext_large",
}
_MOBILENET = "Howard et al., Searching for MobileNetV3, 2019 (arXiv:1905.02244)"
_EFFICIENTNET = "Tan and Le, EfficientNet, 2019 (arXiv:1905.11946), table 2"
_RESNET = "github.com/KaimingHe/deep-residual-networks, one crop"
# Height and width of the images, top-1 on ImageNet in percent, and where it is published.
FLOAT: dict[str, tuple[Callable[[], nn.Module], int, float, str]] = {
    "MobileNetV3-Small": (mobilenet_v3_small, 224, 67.4, _MOBILENET),
    "MobileNetV3-Large": (mobilenet_v3_large, 224, 75.2, _MOBILENET),
    "EfficientNet-B0": (efficientnet_b0, 224, 77.1, _EFFICIENTNET),
    "EfficientNet-B3": (efficientnet_b3, 300, 81.6, _EFFICIENTNET),
    "ResNet-50": (resnet50, 224, 75.3, _RESNET),
}
_STATISTICS_IMAGES = 8
FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known about a contestant before it is timed.

    Attributes:
        name: key of its samples.
        network: its name in tables.
        runs: "bits", "float32", "bfloat16" or "int8".
        how: the program that runs it, and its input.
        top1: published accuracy of the trained network, in percent.
        source: where the accuracy is published.
        parameters: number of parameters of the network.
        bytes: size of the `.biper` file; for a float network, of all parameters in its precision.
        binary_macs, float_macs: multiply-accumulates for one image, including padded taps.
    """

    network: str
    runs: str
    how: str
    top1: float
    source: str
    parameters: int
    bytes: int
    binary_macs: int = 0
    float_macs: int

    @property
    def name(self) -> str:
        return f"{self.network}, {self.runs}"


@dataclass(frozen=True)
class FloatNet:
    """A float network in eval mode, its graph with constants folded, and the side of its images."""

    model: nn.Module
    graph: fx.GraphModule
    side: int


def binary_net(label: str) -> tuple[Entry, Engine]:
    """Convert a network of the registry, with random weights.

    Raises:
        ConversionError: the engine differs from its float network.
    """
    published = architecture(BINARY[label])
    assert published.reported_top1 is not None
    pair = contestants(ModelSource(text=published.name), None, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.biper"
        pair.engine.save(path)
        file_bytes = path.stat().st_size
    entry = Entry(
        network=label,
        runs="bits",
        how=f"{published.name} on the engine, float layers in float32. {pair.checked}",
        top1=published.reported_top1,
        source=published.source,
        parameters=parameters(pair.model),
        bytes=file_bytes,
        binary_macs=pair.engine.report.binary_macs,
        float_macs=pair.engine.report.float_macs,
    )
    return entry, pair.engine


def float_net(label: str) -> tuple[list[Entry], FloatNet]:
    """Build a network with random weights; return an entry per precision, and the network."""
    build, side, top1, source = FLOAT[label]
    model = as_if_trained(build, side)
    images = torch.zeros(2, 3, side, side)
    with FlopCounterMode(display=False) as counter:
        model(images)
    entries = [
        Entry(
            network=label,
            runs=precision,
            how="OpenVINO, LATENCY hint, one stream, from ONNX with BatchNorm folded",
            top1=top1,
            source=source,
            parameters=parameters(model),
            bytes=size * parameters(model),
            float_macs=counter.get_total_flops() // (2 * len(images)),
        )
        for precision, size in FLOAT_BYTES.items()
    ]
    return entries, FloatNet(model, folded_network(model, images), side)


def as_if_trained(build: Callable[[], nn.Module], side: int) -> nn.Module:
    """Return a network in eval mode with seeded weights and the BatchNorm statistics of its maps.

    With other statistics, maps grow from block to block; squeeze-and-excite is then a steep
    function of them and amplifies rounding differences.
    """
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        model = build().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # statistics of this batch only, without the old ones
        model.train()(torch.randn(_STATISTICS_IMAGES, 3, side, side))
    return model.eval()


def random_images(*shape: int) -> Tensor:
    """Return seeded images of a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def parameters(model: nn.Module) -> int:
    return sum(values.numel() for values in model.parameters())


def contest(
    engines: Mapping[str, Engine],
    floats: Mapping[str, FloatNet],
    batch: int,
    threads: int,
    budget: Budget,
) -> dict[str, Any]:
    """Time all networks at one batch size, in turn and alone.

    Args:
        engines: engines by name.
        floats: float networks by name; each name is combined with each of `FLOAT_BYTES`.
        batch: number of images.
        threads: number of threads of each network.
        budget: time for all together.

    Returns:
        JSON values, with raw samples.

    Raises:
        RuntimeError: a network does not run in float32, or its logits differ from PyTorch's.
    """
    calls: dict[str, Any] = {
        name: partial(engine, random_images(batch, *engine.input_shape))
        for name, engine in engines.items()
    }
    rest_ms, differences, agreed, reasons = {}, {}, {}, {}
    for network, net in floats.items():
        images = random_images(batch, 3, net.side, net.side)
        rivals = openvino_float_rivals(net.graph, net.model, images, threads)
        for runs, rival in zip(FLOAT_BYTES, rivals, strict=True):
            name = f"{network}, {runs}"
            if rival.call is None and runs == "float32":
                raise RuntimeError(f"Nothing was timed. {name}: {rival.reason}")
            if rival.call is None:
                reasons[name] = rival.reason
                continue
            calls[name], rest_ms[name] = rival.bound(images), rival.rest_ms
            differences[name] = relative_difference(calls[name](), net.model(images))
            if rival.agreed is not None:
                agreed[name] = list(rival.agreed)
    samples, alone_ms = in_turn_and_alone(calls, budget, rest_ms)
    return {
        "batch": batch,
        "contestants": {name: taken.to_dict() for name, taken in samples.items()},
        "largest_relative_difference": differences,
        "images_agreed": agreed,
        "alone_ms": alone_ms,
        "did_not_run": reasons,
    }


def measure(batches: Sequence[int], threads: int, budget: Budget) -> dict[str, Any]:
    """Build everything and time it at each batch size.

    Raises:
        ConversionError, RuntimeError, ValueError: timing is not possible as requested; the message
            says why.
    """
    with torch_threads(common_threads(threads)):
        entries: list[Entry] = []
        engines: dict[str, Engine] = {}
        for label in BINARY:
            entry, engine = binary_net(label)
            entries.append(entry)
            engines[entry.name] = engine
        floats: dict[str, FloatNet] = {}
        for label in FLOAT:
            both, floats[label] = float_net(label)
            entries += both
        with torch.inference_mode():
            contests = [contest(engines, floats, batch, threads, budget) for batch in batches]
        return {
            "threads": threads,
            "networks": {entry.name: asdict(entry) for entry in entries},
            "machine": machine_facts(),
            "batches": contests,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", required=True, help="the end of the file's name")
    parser.add_argument("--batch", type=int, action="append", help="repeatable; 1 and 8")
    parser.add_argument("--threads", type=int, default=2, help="of every network")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing for each batch")
    parser.add_argument("--tries", type=int, default=3, help="runs at most, as of rivals.py; 3")
    parser.add_argument("--into", type=Path, default=RESULTS)
    options = parser.parse_args()
    budget = replace(TURNS, seconds=options.seconds)
    values = least_disturbed(
        measure(options.batch or [1, 8], options.threads, budget)
        for _ in range(max(options.tries, 1))
    )
    record(values, options.into / f"frontier-{options.machine}.json")
    for found in values["batches"]:
        print(f"batch {found['batch']}")
        for name, taken in found["contestants"].items():
            alone_ms = found["alone_ms"][name]
            print(f"  {name}: {taken['median_ms']:.3f} ms, alone {alone_ms:.3f} ms")
        for name, reason in found["did_not_run"].items():
            print(f"  {name} did not run: {reason}")
    print("\n".join(tries_told(values)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
