"""The step `ceilings`: what this GPU does at most, before anything is compared with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from gpu_machine import keep, no_gpu
from gpu_timer import Clock, Contender, CudaClock, turns

from biper_engine.bench.timer import Budget

# biper::PeakKind of csrc/cuda/peak.h, and what a rate is called in the results.
PEAKS = {"binary_macs": 0, "popcount_macs": 1, "int8_macs": 2, "float_mma_macs": 3, "launches": 4}
PEAK_MS = 40
COPY_BYTES = 2**30
PRODUCT = 8192
BUDGET = Budget(seconds=1.5, fewest=5, most=200, warmup=0)


def rate(call: Callable[[], object], amount: float, clock: Clock) -> float:
    """Return how much a second a call does, where one does `amount`; of its median time."""
    taken = turns([Contender(name="it", call=call)], clock, BUDGET)["it"]
    return amount / (1e-3 * taken.throughput.median_ms)


def copy_rate(nbytes: int, device: torch.device, clock: Clock) -> float:
    """Return the bytes a second, read and written, of copies between two buffers of `nbytes`."""
    source = torch.randint(0, 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return rate(lambda: target.copy_(source), 2 * nbytes, clock)


def product_rate(size: int, dtype: torch.dtype, device: torch.device, clock: Clock) -> float:
    """Return the MACs a second of a square product of random matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    return rate(lambda: torch.mm(a, b, out=out), float(size) ** 3, clock)


def peaks(measure: Callable[[int, int], float]) -> tuple[dict[str, float], dict[str, str]]:
    """Return rates of single units, and why others have none.

    Args:
        measure: takes one of `PEAKS` and milliseconds, returns operations a second, or raises
            RuntimeError with the reason.
    """
    rates, reasons = {}, {}
    for name, kind in PEAKS.items():
        try:
            rates[name] = measure(kind, PEAK_MS)
        except RuntimeError as error:
            reasons[name] = str(error)
    return rates, reasons


def measure_peak() -> Callable[[int, int], float]:
    """Return the extension's function.

    Raises:
        RuntimeError: there is none.
    """
    try:
        from biper_engine import _cuda
    except ImportError as error:
        raise RuntimeError(f"biper_engine._cuda cannot be imported: {error}") from error
    function: Callable[[int, int], float] | None = getattr(_cuda, "measure_peak", None)
    if function is None:
        raise RuntimeError("biper_engine._cuda has no measure_peak")
    return function


def lines(values: dict[str, Any]) -> list[str]:
    """Return each ceiling in the unit that one knows it in."""
    units = {
        "copy_bytes": ("copy, read and written", 1e-9, "GB/s"),
        "l2_copy_bytes": ("copy within L2", 1e-9, "GB/s"),
        "binary_macs": ("1-bit mma.sync", 2e-12, "TOPS"),
        "popcount_macs": ("popcount", 2e-12, "TOPS"),
        "int8_macs": ("int8 mma.sync", 2e-12, "TOPS"),
        "float_mma_macs": ("float16 mma.sync", 2e-12, "TFLOP/s"),
        "float_macs": (f"float16 product of {PRODUCT}", 2e-12, "TFLOP/s"),
    }
    found = [
        f"{text}: {values[name] * factor:,.0f} {unit}"
        for name, (text, factor, unit) in units.items()
        if name in values
    ]
    if values.get("launches"):
        found.append(f"launch gap in a CUDA graph: {1e6 / values['launches']:.2f} us")
    return found + [f"{name}: not measured, {why}" for name, why in values["not_measured"].items()]


def main() -> int:
    reason = no_gpu()
    if reason is not None:
        print(f"no GPU: {reason}")
        return 1
    device, clock = torch.device("cuda"), CudaClock()
    values: dict[str, Any] = {"l2_bytes": torch.cuda.get_device_properties(0).L2_cache_size}
    values["not_measured"] = {}
    values["copy_bytes"] = copy_rate(COPY_BYTES, device, clock)
    # Two buffers in a quarter of it: L2 is in two halves, and data may be in both.
    values["l2_copy_bytes"] = copy_rate(max(values["l2_bytes"] // 8, 2**20), device, clock)
    values["float_macs"] = product_rate(PRODUCT, torch.float16, device, clock)
    keep("ceilings", values)
    failed = False
    try:
        rates, values["not_measured"] = peaks(measure_peak())
        values |= rates
    except RuntimeError as error:
        values["not_measured"], failed = dict.fromkeys(PEAKS, str(error)), True
    keep("ceilings", values)
    print("\n".join(lines(values)))
    absent = ", ".join(values["not_measured"]) or "nothing"
    print(f"copy {values['copy_bytes'] * 1e-12:.2f} TB/s; not measured: {absent}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
