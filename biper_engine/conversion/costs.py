"""Costs: which binary convolutions are slower on bits than in floating point.

A vector of the binary kernel holds the output channels of one group. Groups of few channels leave
most of it empty, while a float kernel fills it with several groups. The choice depends only on this
table and the layer's shape, so that a network gives the same engine on every machine.
"""

from __future__ import annotations

from biper_engine.geometry import Conv2dGeometry

__all__ = ["slower_on_bits"]

TIMES_OF_FLOAT = {1: 17, 2: 2.4, 4: 1.7, 8: 1.3, 16: 0.8, 32: 0.4}
"""Time of a grouped 3x3 convolution on bits over that of PyTorch's in float32, by channels per
group, on the `cpu` backend with AVX-512; with AVX2 it is 28, 4.1, 3.0, 1.9, 0.8 and 0.5.

Source: benchmarks/grouped.py, with results in benchmarks/results/grouped-*.json (a Xeon with
AVX-512, one thread, one image of 28x28, 256 output channels)."""

WORTH = 1.2
"""Largest ratio at which bits are used: turning bits into signs for a float layer costs, too."""


def slower_on_bits(geometry: Conv2dGeometry, terms: int) -> str | None:
    """Return why a binary convolution should stay in floating point, or None if bits are faster.

    Args:
        geometry: the convolution.
        terms: number of binary convolutions for its weight; see `BinaryWeight`.
    """
    channels = geometry.group_channels
    measured = [ratio for most, ratio in TIMES_OF_FLOAT.items() if channels <= most]
    if geometry.groups == 1 or not measured or measured[0] * terms <= WORTH:
        return None
    times = measured[0] * terms
    name = "depthwise convolutions" if channels == 1 else "convolutions"
    plural = "s" * (channels != 1)
    return (
        f"{name} of {channels} channel{plural} per group are about {times:.2g} times "
        "as fast in float on the cpu backend"
    )
