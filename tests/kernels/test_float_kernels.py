"""The fused float kernels against plain PyTorch, in Triton's interpreter.

The order of sums is not specified, so floats are compared within a bound on the error of a sum of K
products, K * 2^-24 of their absolute values, and one rounding to the stream; bits are compared if
the value is further than that from the threshold. `tests/ops/test_triton.py` starts these tests.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from biper_engine import bits as contract
from biper_engine.geometry import Pool2dGeometry
from biper_engine.ops.stem import Stem
from biper_engine.ops.triton import TritonBackend
from tests.ops.matrix import STREAMS
from tests.shared import triton_is_interpreted

pytestmark = pytest.mark.skipif(
    not triton_is_interpreted(), reason="these tests need triton and TRITON_INTERPRET=1"
)
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
POOL = Pool2dGeometry(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))


def stem_of(channels: int, filters: int, kernel: int, **options: Any) -> Stem:
    generator = torch.Generator().manual_seed(1)
    defaults = {
        "weight": torch.randn(filters, channels, kernel, kernel, generator=generator) * 0.2,
        "bias": torch.randn(filters, generator=generator),
        "stride": (1, 1),
        "padding": (kernel // 2,) * 4,
        "pool": Pool2dGeometry(),
        "clamp_min": None,
        "clamp_max": None,
        "scale": None,
        "offset": None,
        "compute_dtype": torch.float32,
        "threshold": torch.randn(filters, generator=generator) * 0.3,
        "sense": torch.arange(filters) % 3 == 0,
        "want_float": True,
        "want_bits": True,
    }
    return Stem(**{**defaults, **options})


def expected(x: Tensor, stem: Stem) -> tuple[Tensor, Tensor]:
    """Return the values before they are stored, in float64, and a bound on float32's error."""
    image = x.float()
    if stem.scale is not None:
        image = image * stem.scale.view(1, -1, 1, 1) + stem.offset.view(1, -1, 1, 1)
    image = image.to(stem.compute_dtype).double()
    weight = stem.weight.to(stem.compute_dtype).double()
    top, bottom, left, right = stem.padding
    padded = F.pad(image, (left, right, top, bottom))
    values = F.conv2d(padded, weight, stride=stem.stride)
    sizes = F.conv2d(padded.abs(), weight.abs(), stride=stem.stride)
    if stem.bias is not None:
        values = values + stem.bias.double().view(1, -1, 1, 1)
        sizes = sizes + stem.bias.double().abs().view(1, -1, 1, 1)
    if not stem.pool.is_identity:
        window = (stem.pool.kernel_size, stem.pool.stride, stem.pool.padding)
        values, sizes = F.max_pool2d(values, *window), F.max_pool2d(sizes, *window)
    if stem.clamp_min is not None:
        values = values.clamp(min=stem.clamp_min)
    if stem.clamp_max is not None:
        values = values.clamp(max=stem.clamp_max)
    terms = weight[0].numel() + 2
    # Scaling rounds twice more before the operand is rounded; a tie may then go the other way.
    operand = 0.0 if stem.scale is None else 2 * UNIT[stem.compute_dtype]
    return values, sizes * (terms * 2.0**-24 + operand)


def check_stem(x: Tensor, stem: Stem) -> None:
    values, bound = expected(x, stem)
    floats, bits = TritonBackend().stem(x, stem)
    if stem.want_float:
        assert floats is not None
        assert floats.dtype == stem.compute_dtype
        assert floats.is_contiguous(memory_format=torch.channels_last)
        allowed = bound + (values.abs() + bound) * UNIT[stem.compute_dtype]
        assert bool(((floats.double() - values).abs() <= allowed).all())
    else:
        assert floats is None
    if stem.want_bits:
        assert bits is not None
        limit = torch.zeros(values.shape[1]) if stem.threshold is None else stem.threshold
        limit = limit.double().view(1, -1, 1, 1)
        above, below = values >= limit, values <= limit
        wanted = (
            above if stem.sense is None else torch.where(stem.sense.view(1, -1, 1, 1), below, above)
        )
        got = contract.unpack_channels(bits, values.shape[1]).permute(0, 3, 1, 2)
        sure = (values - limit).abs() > bound
        assert bool((sure | (values == limit)).double().mean() > 0.9)
        assert torch.equal(got & sure, wanted & sure)
    else:
        assert bits is None


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize(
    "compute",
    [
        torch.float16,
        *(pytest.param(d, marks=pytest.mark.deep) for d in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_a_7x7_stem_is_convolved_pooled_clamped_and_binarized(compute: torch.dtype) -> None:
    options = {"stride": (2, 2), "pool": POOL, "clamp_min": -1.0, "clamp_max": 1.0}
    check_stem(image(2, 3, 15, 17), stem_of(3, 40, 7, compute_dtype=compute, **options))


@pytest.mark.deep
@pytest.mark.parametrize("dtype", [*STREAMS.values(), torch.uint8], ids=str)
def test_a_3x3_stem_takes_images_of_any_type_and_strides(dtype: torch.dtype) -> None:
    x = image(2, 3, 6, 9, dtype=dtype)
    scale, offset = torch.tensor([0.02, 0.01, 0.03]), torch.tensor([-2.0, 1.0, 0.5])
    stem = stem_of(3, 33, 3, scale=scale, offset=offset, padding=(1, 0, 2, 1))
    check_stem(x, stem)
    check_stem(x.contiguous(memory_format=torch.channels_last), stem)
    check_stem(x[:, :, ::2, 1:], stem)


@pytest.mark.deep
@pytest.mark.parametrize(
    "options",
    [
        {"want_float": False, "bias": None},
        {"want_bits": False, "threshold": None, "sense": None},
        {"threshold": None, "sense": None, "clamp_min": 0.0},
    ],
)
def test_a_stem_gives_what_is_wanted(options: dict[str, Any]) -> None:
    check_stem(image(1, 5, 6, 5), stem_of(5, 70, 3, **options))


def test_the_tail_of_one_image_is_a_linear_layer_of_its_means() -> None:
    x, weight = image(1, 5, 2, 3), image(4, 5)
    result = TritonBackend().pooled_linear(x, weight, None)
    expected = F.linear(x.double().mean((2, 3)), weight.double())
    assert bool(((result.double() - expected).abs() <= 1e-5).all())


def test_an_empty_batch_passes_through() -> None:
    floats, bits = TritonBackend().stem(image(0, 3, 6, 6), stem_of(3, 8, 3))
    assert floats is not None
    assert bits is not None
    assert floats.shape == (0, 8, 6, 6)
    assert bits.shape == (0, 6, 6, 1)
    assert TritonBackend().pooled_linear(image(0, 3, 2, 2), image(4, 3), None).shape == (0, 4)


@pytest.mark.deep
@pytest.mark.parametrize("dtype", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("shape", [(3, 70, 7, 5), (1, 33, 1, 1), (18, 8, 9, 9)])
def test_the_tail_is_a_mean_and_a_linear_layer(
    dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    x, weight, bias = image(*shape, dtype=dtype), image(67, shape[1]).to(dtype), image(67)
    terms = shape[1] + shape[2] * shape[3] + 2
    last = x.contiguous(memory_format=torch.channels_last)
    for source, offset in ((x, bias), (last, bias.to(dtype)), (x[:, :, :, ::2], None)):
        mean = source.double().mean((2, 3))
        values = F.linear(mean, weight.double())
        sizes = F.linear(source.double().abs().mean((2, 3)), weight.double().abs())
        if offset is not None:
            values, sizes = values + offset.double(), sizes + offset.double().abs()
        result = TritonBackend().pooled_linear(source, weight, offset)
        assert result.dtype == dtype
        allowed = sizes * terms * 2.0**-24 + values.abs() * UNIT[dtype] * 1.01
        assert bool(((result.double() - values).abs() <= allowed).all())
