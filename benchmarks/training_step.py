"""Time a training step of cifar10/resnet20_1w1a in both stages, and of its float twin, in turn.

    python benchmarks/training_step.py --machine NAME [--batch 48] [--compile] [--bfloat16]

One thread. A step is forward, loss with the regularizer, backward and SGD, for random images
of 32x32 in channels_last memory, as `biper train` has them. Writes

    benchmarks/results/training_step-...-MACHINE.json      all samples; ratios are of medians
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from recording import RESULTS, record
from torch import Tensor
from torch.nn import functional as F

from biper_engine.bench.machine import machine_facts
from biper_engine.bench.timer import Budget, interleave
from biper_engine.models import build
from biper_engine.nn import binary_layers, regularizer

TWIN = "float twin"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--machine", required=True, help="name for the recorded file")
    parser.add_argument("--batch", type=int, default=48, help="images of a step")
    parser.add_argument("--compile", action="store_true", help="run through torch.compile")
    parser.add_argument("--bfloat16", action="store_true", help="autocast, as bf16-mixed")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring")
    options = parser.parse_args()
    torch.set_num_threads(1)
    calls = {
        name: step(architecture, stage, options)
        for name, architecture, stage in (
            ("stage 1", "cifar10/resnet20_1w1a", 1),
            ("stage 2", "cifar10/resnet20_1w1a", 2),
            (TWIN, "cifar10/resnet20", 1),
        )
    }
    samples = interleave(calls, Budget(seconds=options.seconds, fewest=10))
    twin = samples[TWIN].median_ms
    for name, found in samples.items():
        image = found.median_ms / options.batch
        print(f"{name:10} {image:6.3f} ms an image, {found.median_ms / twin:5.3f} times the twin's")
    kind = "compiled" if options.compile else "eager"
    kind += "-bfloat16" if options.bfloat16 else ""
    contestants = {name: found.to_dict() for name, found in samples.items()}
    facts = {"machine": machine_facts(), "batch": options.batch, "contestants": contestants}
    record(facts, RESULTS / f"training_step-{kind}-{options.machine}.json")


def step(architecture: str, stage: int, options: argparse.Namespace) -> Callable[[], Tensor]:
    """Return a training step of a network that it keeps."""
    torch.manual_seed(0)
    network = build(architecture).train().to(memory_format=torch.channels_last)
    for _, layer in binary_layers(network):
        layer.stage = stage
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    forward = torch.compile(network) if options.compile else network
    images = torch.randn(options.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(options.batch) % 10

    def run() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            loss = F.cross_entropy(forward(images), labels) + regularizer(network)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


if __name__ == "__main__":
    main()
