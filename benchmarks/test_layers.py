"""ResNet-18's binary convolutions on bits, with epilogue, and PyTorch's float convolution.

One group per layer, so that pytest-benchmark prints both and their ratio; one thread, one image.
Each pair is called in turn, after its results are compared. The kernel alone, without Python and
with its data in the caches, is timed twice, also in turn: as in a network, and with only bits as
output, which adds almost nothing to the accumulators.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from biper_engine.bench import (
    RESNET18_LAYERS,
    Budget,
    ConvShape,
    LayerWork,
    interleave,
    machine_facts,
    torch_threads,
)
from biper_engine.ops.backends import backends

CPU = {info.name: info.reason for info in backends()}["cpu"]
BUDGET = Budget(seconds=3.0, fewest=20, most=400, warmup=10)
KERNEL_CALLS = 400

pytestmark = pytest.mark.skipif(CPU is not None, reason=f"cpu: {CPU}")


@pytest.fixture(scope="module")
def peak() -> dict[str, float | None]:
    from biper_engine.ops.cpu_processor import popcount_peak

    measured = popcount_peak()
    return {
        "macs_per_second": measured.macs_per_second,
        "macs_per_clock": measured.macs_per_clock,
    }


def kernels(work: LayerWork, peak: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Time the kernel alone, in turn; median and quartiles in us, and the share of the peak."""
    calls = {"bits_only": work.kernel_call(fused=False), "fused": work.kernel_call(fused=True)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(KERNEL_CALLS):
        for name, call in calls.items():
            call()  # loads its data into the caches again
            seconds[name].append(call())
    found = {}
    for name, taken in seconds.items():
        first, median, third = statistics.quantiles(taken, n=4)
        found[name] = {
            "median_us": 1e6 * median,
            "quartiles_us": [1e6 * first, 1e6 * third],
            "share_of_popcount_peak": work.shape.macs / median / peak["macs_per_second"],
        }
    return found


@pytest.mark.parametrize("shape", RESNET18_LAYERS, ids=lambda shape: shape.name)
def test_layer(benchmark, shape: ConvShape, peak: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    work = LayerWork(shape)
    with torch_threads(1), torch.no_grad():
        taken = interleave({"float": work.float_call, "engine": work.engine_call}, BUDGET)
        benchmark.pedantic(work.engine_call, rounds=50, warmup_rounds=5)
        alone = kernels(work, peak)
    ours, theirs = taken["engine"].median_ms, taken["float"].median_ms
    rate = shape.macs / (ours * 1e-3)
    benchmark.extra_info |= {
        "layer": shape.name,
        "backend": work.backend,
        "float_conv2d": taken["float"].to_dict(),
        "engine_in_turn": taken["engine"].to_dict(),
        "times_as_fast_as_conv2d": theirs / ours,
        "macs_per_second": rate,
        "share_of_popcount_peak": rate / peak["macs_per_second"],
        "kernel": alone,
        "popcount_peak": peak,
        "machine": machine_facts(),
    }
    bits_only, fused = (alone[name]["share_of_popcount_peak"] for name in ("bits_only", "fused"))
    print(
        f"\n{shape.name}: {ours * 1e3:.1f} us, F.conv2d {theirs * 1e3:.1f} us, "
        f"{theirs / ours:.1f} times as fast, {rate / peak['macs_per_second']:.0%} of the peak of "
        f"{peak['macs_per_second'] * 1e-9:,.0f} GMAC/s ({peak['macs_per_clock']:.0f}/clock); the "
        f"kernel alone {fused:.0%}, where only bits leave {bits_only:.0%}"
    )
