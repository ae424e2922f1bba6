"""Time grouped binary convolutions and PyTorch's float ones, for conversion/costs.py.

    python benchmarks/grouped.py --machine NAME [--isa avx2]

One thread, one image of 28x28, 256 output channels, both in channels_last memory. The binary
convolution starts from bits and stores floats, as in a network; its weights are prepacked. Each
number is the least processor time of several runs in turn, so that other work on the machine has
little effect.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

OUTPUTS, SIZE, ROUNDS = 256, 28, 15
PER_GROUP = (1, 2, 4, 8, 16, 32)
KERNELS = (1, 3, 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", required=True, help="name for the recorded file")
    parser.add_argument("--isa", help="instruction set of BIPER_CPU_ISA and PyTorch")
    options = parser.parse_args()
    if options.isa:
        os.environ |= {"BIPER_CPU_ISA": options.isa, "ATEN_CPU_CAPABILITY": options.isa}
        os.environ["ONEDNN_MAX_CPU_ISA"] = options.isa.upper()

    from recording import RESULTS, record

    from biper_engine.bench.machine import machine_facts

    rows = [measure(*case) for case in itertools.product(PER_GROUP, PER_GROUP, KERNELS)]
    for row in rows:
        print(
            f"{row['inputs']:2} > {row['outputs']:2} channels per group, "
            f"{row['kernel']}x{row['kernel']}: bits {row['bits_us']:8.0f} us, "
            f"float {row['float_us']:8.0f} us, {row['bits_us'] / row['float_us']:6.2f} times",
            flush=True,
        )
    isa = f"-{options.isa}" if options.isa else ""
    path = RESULTS / f"grouped{isa}-{options.machine}.json"
    record({"machine": machine_facts(), "channels": OUTPUTS, "size": SIZE, "rows": rows}, path)


def measure(inputs: int, outputs: int, kernel: int) -> dict[str, Any]:
    """Return the times of one geometry."""
    import torch
    import torch.nn.functional as F

    from biper_engine import bits as contract
    from biper_engine import ops
    from biper_engine.geometry import Conv2dGeometry
    from biper_engine.ops.epilogue import Epilogue

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    groups, padding = OUTPUTS // outputs, kernel // 2
    geometry = Conv2dGeometry(
        in_channels=groups * inputs,
        out_channels=OUTPUTS,
        kernel_size=(kernel, kernel),
        padding=(padding,) * 4,
        groups=groups,
    )
    x = torch.randn(1, groups * inputs, SIZE, SIZE, generator=generator)
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(OUTPUTS, inputs, kernel, kernel, generator=generator).sign()
    bits, packed = ops.binarize(x), contract.pack_weight(weight > 0)
    prepacked = ops.prepack(packed, geometry, "cpu")
    epilogue = Epilogue(multiplier=torch.ones(OUTPUTS), bias=torch.zeros(OUTPUTS))
    with torch.no_grad():
        times = least_us(
            lambda: ops.bconv2d_float(bits, packed, geometry, epilogue, prepacked=prepacked),
            lambda: F.conv2d(x, weight, None, 1, padding, 1, groups),
        )
    case = {"inputs": inputs, "outputs": outputs, "kernel": kernel}
    return {**case, "bits_us": times[0], "float_us": times[1]}


def least_us(*calls: Callable[[], Any]) -> list[float]:
    """Return the least processor time of each call, in microseconds."""
    best = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for index, call in enumerate(calls):
            start = time.thread_time()
            call()
            best[index] = min(best[index], (time.thread_time() - start) * 1e6)
    return best


if __name__ == "__main__":
    main()
