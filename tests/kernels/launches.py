"""Representative launches: every kernel, with the operands that need the most registers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.kernels import (
    bconv2d,
    bconv2d_popcount,
    binarize,
    bmaxpool2d,
    convolution,
    pooled_linear,
    stem,
)
from biper_engine.ops import Epilogue
from tests.kernels.compiling import Launch, recorded

META = torch.device("meta")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
NO_POOL = Pool2dGeometry()
POOL = Pool2dGeometry(kernel_size=(2, 2), stride=(2, 2))
STEM_POOL = Pool2dGeometry(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))


def _empty(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _epilogue(channels: int, pool: Pool2dGeometry, slope: bool) -> Epilogue:
    vector, flags = _empty(channels), _empty(channels, dtype=torch.bool)
    activation: dict[str, Any] = {"clamp_min": -1.0, "clamp_max": 1.0}
    if slope:
        activation = {"slope": vector, "shift": vector}
    return Epilogue(
        multiplier=vector,
        bias=vector,
        pool=pool,
        pool_min=None if pool.is_identity else flags,
        threshold=vector,
        sense=flags,
        **activation,
    )


def convolve(
    channels: int,
    filters: int,
    kernel: int,
    size: int,
    *,
    batch: int = 256,
    groups: int = 1,
    stream: torch.dtype | None = None,
    bits: bool = False,
    residual: bool = False,
    pool: Pool2dGeometry = NO_POOL,
    slope: bool = False,
) -> Callable[[int], list[Launch]]:
    """Return a recorder of one convolution; accumulators leave where nothing else does."""
    conv = Conv2dGeometry(
        in_channels=channels,
        out_channels=filters,
        kernel_size=(kernel, kernel),
        padding=(kernel // 2,) * 4,
        groups=groups,
    )
    module: Any = bconv2d_popcount if groups > 1 or filters <= 4 else bconv2d
    conv_size = conv.output_size(size, size)
    out_size = conv_size if pool.is_identity else pool.output_size(*conv_size)
    shape = (batch, filters, *out_size)

    def record(capability: int) -> list[Launch]:
        packed = _empty(batch, size, size, -(-channels // 32), dtype=torch.int32)
        accumulators = stream is None and not bits
        outputs = convolution.Outputs(
            packed, shape, accumulators=accumulators, float_dtype=stream, packed=bits
        )
        kind = torch.int32 if module is bconv2d_popcount else torch.int8
        weight = _empty(*module.layout(conv), dtype=kind)
        added = _empty(*shape, dtype=stream or FLOAT) if residual else None
        epilogue = None if accumulators else _epilogue(filters, pool, slope)
        name = module.__name__.rpartition(".")[2] + "_kernel"
        with recorded(module, [name], capability) as launches:
            module.run(packed, weight, conv, pool, conv_size, outputs, epilogue, added)
        return launches

    return record


def begin(
    dtype: torch.dtype,
    kernel: int,
    stride: int,
    size: int,
    pool: Pool2dGeometry,
    source: torch.dtype,
) -> Callable[[int], list[Launch]]:
    """Return a recorder of a stem of 3 to 64 channels, floats and bits."""
    vector = _empty(64)
    parameters = SimpleNamespace(
        weight=_empty(64, 3, kernel, kernel),
        bias=vector,
        stride=(stride, stride),
        padding=(kernel // 2,) * 4,
        pool=pool,
        clamp_min=-1.0,
        clamp_max=1.0,
        scale=_empty(3) if source == torch.uint8 else None,
        offset=_empty(3) if source == torch.uint8 else None,
        compute_dtype=dtype,
        threshold=vector,
        sense=_empty(64, dtype=torch.bool),
    )
    conv_size = (size // stride, size // stride)
    out_size = conv_size if pool.is_identity else pool.output_size(*conv_size)

    def record(capability: int) -> list[Launch]:
        x = _empty(256, 3, size, size, dtype=source)
        outputs = convolution.Outputs(x, (256, 64, *out_size), float_dtype=dtype, packed=True)
        with recorded(stem, ["stem_kernel"], capability) as launches:
            stem.run(x, parameters, conv_size, outputs)
        return launches

    return record


def end(dtype: torch.dtype) -> Callable[[int], list[Launch]]:
    """Return a recorder of a tail: 512 channels of 7x7 pixels to 1000 classes."""

    def record(capability: int) -> list[Launch]:
        x, weight = _empty(256, 512, 7, 7, dtype=dtype), _empty(1000, 512, dtype=dtype)
        with recorded(pooled_linear, ["mean_kernel", "linear_kernel"], capability) as launches:
            pooled_linear.pooled_linear(x, weight, _empty(1000))
        return launches

    return record


def maps(capability: int) -> list[Launch]:
    """Record binarize from both memory orders, unbinarize and the pool of bits."""
    x, vector, flags = _empty(8, 64, 56, 56, dtype=HALF), _empty(64), _empty(64, dtype=torch.bool)
    bits = _empty(8, 56, 56, 2, dtype=torch.int32)
    with recorded(binarize, ["binarize_kernel", "unbinarize_kernel"], capability) as launches:
        binarize.binarize(x, vector, flags)
        binarize.binarize(x.contiguous(memory_format=torch.channels_last), None, None)
        binarize.unbinarize(bits, 64, BFLOAT)
    with recorded(bmaxpool2d, ["bmaxpool2d_kernel"], capability) as pools:
        bmaxpool2d.bmaxpool2d(bits, 64, POOL, (28, 28), flags)
    return launches + pools


MATRIX = {
    "accumulators": convolve(64, 64, 3, 56),
    "float16, bits, residual": convolve(64, 64, 3, 56, stream=HALF, bits=True, residual=True),
    "bfloat16, bits, residual, slope": convolve(
        512, 512, 3, 14, stream=BFLOAT, bits=True, residual=True, slope=True
    ),
    "everything pooled": convolve(
        128, 128, 3, 32, stream=HALF, bits=True, residual=True, slope=True, pool=POOL
    ),
    "bits of one image": convolve(256, 256, 3, 14, bits=True, batch=1),
    "odd channels": convolve(33, 37, 3, 32, stream=FLOAT, bits=True),
    "linear": convolve(1024, 1000, 1, 1, stream=FLOAT, residual=True),
}
POPCOUNT = {
    "groups of 16": convolve(128, 128, 3, 32, groups=8, stream=HALF, bits=True, residual=True),
    "groups of 64, pooled": convolve(
        128, 128, 3, 32, groups=2, stream=HALF, bits=True, residual=True, slope=True, pool=POOL
    ),
    "four filters": convolve(128, 4, 3, 32, stream=HALF, bits=True),
}
STEMS = {
    "7x7 stem in float16": begin(HALF, 7, 2, 224, STEM_POOL, torch.uint8),
    "3x3 stem in bfloat16": begin(BFLOAT, 3, 1, 32, NO_POOL, FLOAT),
    "7x7 stem in float32": begin(FLOAT, 7, 2, 224, STEM_POOL, FLOAT),
}
OTHERS = {"maps": maps, "tail": end(HALF)}
