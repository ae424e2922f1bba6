"""ResNet-18's binary convolutions on bits, epilogue included, beside PyTorch's float convolution.

One group per layer, so that pytest-benchmark prints both and their ratio; one thread, one image.
Each pair is called in turn, and its answers are compared before.
"""

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

pytestmark = pytest.mark.skipif(CPU is not None, reason=f"cpu: {CPU}")


@pytest.fixture(scope="module")
def peak() -> dict[str, float | None]:
    from biper_engine.ops.cpu import popcount_peak

    measured = popcount_peak()
    return {
        "macs_per_second": measured.macs_per_second,
        "macs_per_clock": measured.macs_per_clock,
    }


@pytest.mark.parametrize("shape", RESNET18_LAYERS, ids=lambda shape: shape.name)
def test_layer(benchmark, shape: ConvShape, peak: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    work = LayerWork(shape)
    with torch_threads(1), torch.no_grad():
        taken = interleave({"float": work.float_call, "engine": work.engine_call}, BUDGET)
        benchmark.pedantic(work.engine_call, rounds=50, warmup_rounds=5)
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
        "popcount_peak": peak,
        "machine": machine_facts(),
    }
    print(
        f"\n{shape.name}: {ours * 1e3:.1f} us, F.conv2d {theirs * 1e3:.1f} us, "
        f"{theirs / ours:.1f} times as fast, {rate / peak['macs_per_second']:.0%} of the peak of "
        f"{peak['macs_per_second'] * 1e-9:,.0f} GMAC/s ({peak['macs_per_clock']:.0f} a clock)"
    )
