"""The operator matrix: geometries, epilogues, maps and pools for which all backends are tested."""

import dataclasses
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from biper_engine import bits as contract
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops import Epilogue

CHANNELS = [1, 31, 32, 33, 63, 64, 65, 127]
STREAMS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SMALLEST_DENORMAL = 2.0**-149


# -- convolutions ---------------------------------------------------------------------------------


def geometry(**changes: Any) -> Conv2dGeometry:
    defaults = {"in_channels": 33, "out_channels": 5, "kernel_size": (3, 3)}
    return Conv2dGeometry(**{**defaults, **changes})


CONVOLUTIONS = {
    **{
        f"{channels} channels": (geometry(in_channels=channels, padding=(1, 1, 1, 1)), (5, 6))
        for channels in CHANNELS
    },
    **{
        f"{channels} filters": (geometry(out_channels=channels), (4, 4))
        for channels in (1, 32, 33, 65)
    },
    "1x1": (geometry(kernel_size=(1, 1)), (7, 9)),
    "1x1 strided": (geometry(kernel_size=(1, 1), stride=(2, 3)), (7, 9)),
    "even kernel": (geometry(kernel_size=(2, 4), padding=(0, 1, 1, 2)), (5, 5)),
    "7x7 stem": (geometry(kernel_size=(7, 7), stride=(2, 2), padding=(3, 3, 3, 3)), (11, 13)),
    "flattened image": (geometry(kernel_size=(5, 6)), (5, 6)),
    "uneven strides": (geometry(stride=(3, 2), padding=(1, 1, 1, 1)), (9, 8)),
    "asymmetric padding": (geometry(padding=(0, 2, 3, 1)), (5, 7)),
    "padding on one side": (geometry(padding=(0, 1, 0, 1), stride=(2, 2)), (6, 6)),
    "windows wholly in the padding": (geometry(padding=(4, 4, 5, 4)), (2, 3)),
    "one pixel": (geometry(padding=(1, 1, 1, 1)), (1, 1)),
    "dilation": (geometry(dilation=(2, 3), padding=(2, 2, 3, 3)), (9, 9)),
    "groups on word borders": (geometry(in_channels=64, out_channels=6, groups=2), (4, 5)),
    "groups across words": (geometry(in_channels=66, out_channels=6, groups=2), (4, 5)),
    "groups within a word": (
        geometry(in_channels=12, out_channels=8, groups=4, padding=(1, 0, 0, 1)),
        (4, 5),
    ),
    "three groups of 40": (geometry(in_channels=120, out_channels=9, groups=3), (4, 5)),
    "groups of 8": (
        geometry(in_channels=24, out_channels=48, groups=3, padding=(1, 1, 1, 1)),
        (5, 6),
    ),
    "16 channels, strided": (
        geometry(in_channels=16, out_channels=16, stride=(2, 1), padding=(1, 1, 1, 1)),
        (7, 11),
    ),
    "16 channels, long strides": (
        geometry(in_channels=16, out_channels=16, stride=(3, 3), padding=(1, 1, 1, 1)),
        (7, 11),
    ),
    "10 channels, dilated": (
        geometry(in_channels=10, out_channels=17, dilation=(2, 3), padding=(2, 2, 3, 3)),
        (9, 9),
    ),
    "depthwise": (geometry(out_channels=33, groups=33, padding=(1, 1, 1, 1)), (4, 5)),
    "everything": (
        geometry(
            in_channels=70,
            out_channels=4,
            kernel_size=(2, 3),
            stride=(2, 1),
            padding=(3, 0, 1, 2),
            dilation=(1, 2),
            groups=2,
        ),
        (6, 7),
    ),
}


def _random_signs(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1


def float64_convolution(signs: Tensor, weight: Tensor, conv: Conv2dGeometry) -> Tensor:
    """Convolve with true zero padding, in float64."""
    top, bottom, left, right = conv.padding
    padded = F.pad(signs, (left, right, top, bottom))
    return F.conv2d(padded, weight, None, conv.stride, 0, conv.dilation, conv.groups)


class Operands:
    """Random operands of a binary convolution, and the accumulators that they must give.

    Attributes:
        signs: float64 +-1 `[N, C, H, W]`.
        weight_signs: float64 +-1 `[O, C / groups, KH, KW]`.
        bits: packed map.
        weight: packed weights, canonical.
        dot: int32 accumulators, by a float64 convolution with true zero padding.
    """

    def __init__(
        self, geometry: Conv2dGeometry, size: tuple[int, int], batch: int, seed: int = 0
    ) -> None:
        shape = (geometry.out_channels, geometry.group_channels, *geometry.kernel_size)
        self.signs = _random_signs(batch, geometry.in_channels, *size, seed=seed)
        self.weight_signs = _random_signs(*shape, seed=seed + 1)
        self.bits = contract.pack_channels((self.signs > 0).permute(0, 2, 3, 1))
        self.weight = contract.pack_weight(self.weight_signs > 0)
        self.dot = float64_convolution(self.signs, self.weight_signs, geometry).to(torch.int32)


# -- epilogues ------------------------------------------------------------------------------------

EPILOGUE_CONV = Conv2dGeometry(
    in_channels=33, out_channels=37, kernel_size=(3, 3), padding=(1, 1, 0, 2)
)
EPILOGUE_SIZE = (5, 4)
EPILOGUE_POOLS = {
    "no pool": Pool2dGeometry(),
    "2x2": Pool2dGeometry(kernel_size=(2, 2), stride=(2, 2)),
    "3x3 padded": Pool2dGeometry(kernel_size=(3, 2), stride=(2, 1), padding=(1, 1)),
}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "hardtanh": {"clamp_min": -1.0, "clamp_max": 1.0},
    "relu": {"clamp_min": 0.0},
    "clamped above": {"clamp_max": 0.1},
    "prelu": {"slope": True},
    "two slopes": {"slope": True, "gain": True},
}
# Pool, activation and residual follow each other: every two of them meet here, and in the weekly
# tests every three.
EPILOGUE_TRIPLES = list(itertools.product(EPILOGUE_POOLS, ACTIVATIONS, (None, *STREAMS)))
EPILOGUE_PAIRS = [
    (pool, activation, stream)
    for pool, activation, stream in EPILOGUE_TRIPLES
    if (list(ACTIVATIONS).index(activation) + [None, *STREAMS].index(stream)) % 3
    == list(EPILOGUE_POOLS).index(pool)
]


def vector(channels: int, *special: float, seed: int, scale: float = 1.0) -> Tensor:
    """Return random values, but for `special` in the first channels that there are."""
    values = torch.randn(channels, generator=torch.Generator().manual_seed(seed)) * scale
    values[: len(special)] = torch.tensor(special)[:channels]
    return values


def epilogue_of(channels: int, pool: str, activation: str) -> Epilogue:
    """Return an epilogue with signed zeros and denormals, without threshold and sense."""
    options = dict(ACTIVATIONS[activation])
    if "slope" in options:
        options["slope"] = vector(channels, 0.0, -0.0, -0.25, 1.0, 0.25, seed=3)
    if "gain" in options:
        options["gain"] = vector(channels, -0.0, 0.0, 1.5, -1.0, seed=6)
    if activation != "hardtanh":
        options["shift"] = vector(channels, 0.0, -0.0, seed=4)
    if pool != "no pool":
        options["pool_min"] = torch.arange(channels) % 3 == 0
    return Epilogue(
        multiplier=vector(
            channels, 0.0, -0.0, 1.0, -1.0, SMALLEST_DENORMAL, -(2.0**-140), seed=1, scale=0.02
        ),
        bias=vector(channels, -0.0, 0.0, 0.0, -0.0, 2.0**-145, 0.0, seed=2, scale=0.3),
        pool=EPILOGUE_POOLS[pool],
        **options,
    )


def residual_of(stream: str | None, *shape: int) -> Tensor | None:
    """Return a residual `[N, O, OH, OW]` with many zeros of either sign; none for no stream."""
    if stream is None:
        return None
    residual = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    residual[:, :7] *= residual[:, :7] > 0
    return residual.to(STREAMS[stream])


def with_met_thresholds(epilogue: Epilogue, values: Tensor) -> Epilogue:
    """Return the epilogue with thresholds that the values `[N, O, OH, OW]` meet, both senses."""
    threshold = values[0, :, 0, 0].clone()
    threshold[7:8], threshold[8:9] = torch.inf, -torch.inf
    sense = torch.arange(threshold.numel()) % 2 == 0
    return dataclasses.replace(epilogue, threshold=threshold, sense=sense)


ZEROS = [-0.0, 0.0]


def signed_zeros(channels: int) -> list[tuple[dict[str, Any], Tensor]]:
    """Return options of an epilogue, and what they make of -0.0 and 0.0 in turn, `[channels]`."""
    negative_zeros = torch.full((channels,), -0.0)
    kept = torch.tensor(ZEROS * (channels // 2))
    return [
        ({}, kept),
        ({"clamp_min": 0.0, "clamp_max": 1.0}, kept),  # -0.0 < 0.0 is false
        ({"clamp_min": -1.0, "clamp_max": -0.0}, kept),  # 0.0 > -0.0 is false
        ({"clamp_min": 1.0, "clamp_max": -0.0}, negative_zeros),
        ({"slope": torch.full((channels,), -3.0)}, kept),  # -0.0 < 0 is false
        ({"shift": negative_zeros}, kept),
        ({"shift": torch.zeros(channels)}, torch.zeros(channels)),
    ]


# -- maps -----------------------------------------------------------------------------------------

MAP_POOLS = [
    Pool2dGeometry(kernel_size=(2, 2), stride=(2, 2)),
    Pool2dGeometry(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)),
    Pool2dGeometry(kernel_size=(1, 4), stride=(3, 1), padding=(0, 2)),
    Pool2dGeometry(kernel_size=(2, 2), stride=(3, 1), padding=(1, 1)),
    Pool2dGeometry(),
]


def packed(bits: Tensor) -> Tensor:
    return contract.pack_channels(bits.permute(0, 2, 3, 1))


def random_map(*shape: int) -> Tensor:
    """Return floats with many zeros of either sign."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return torch.where(x.abs() < 0.3, torch.copysign(torch.zeros(()), x), x)


def met_thresholds(x: Tensor) -> Tensor:
    """Return thresholds `[C]`: a value of its channel for most, else an infinity."""
    threshold = x[0, :, 0, 0].clone()
    threshold[::5] = torch.inf
    threshold[1::7] = -torch.inf
    return threshold
