"""The fused float ends: their results and errors, on every backend that has them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from biper_engine import bits as contract
from biper_engine.errors import BackendUnavailableError, GeometryError
from biper_engine.geometry import Pool2dGeometry
from biper_engine.graph import OPERATORS
from biper_engine.ops import Stem
from biper_engine.ops.backends import Backend, by_name, select
from biper_engine.ops.functional import pooled_linear, stem, stem_bits
from biper_engine.ops.plan_operators import PLAN_SCHEMAS
from biper_engine.ops.reference import apply_stem
from biper_engine.ops.stem import PLAN_OPERATORS
from tests.images import noise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POOL = Pool2dGeometry(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))


def pixels(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def parameters(out: int = 40, kernel: int = 7, **changes: Any) -> Stem:
    """Return the stem of an ImageNet network, with some of its parameters changed."""
    values: dict[str, Any] = {
        "weight": noise(out, 3, kernel, kernel, seed=1) / (3 * kernel * kernel) ** 0.5,
        "bias": noise(out, seed=2),
        "stride": (2, 2),
        "padding": (kernel // 2,) * 4,
        "pool": POOL,
        "clamp_min": -1.0,
        "clamp_max": 1.0,
        "threshold": noise(out, seed=3) / 4,
        "sense": torch.arange(out) % 3 == 1,
    }
    return Stem(**{**values, **changes})


def on(device: torch.device, given: Stem) -> Stem:
    tensors = {
        entry.name: value.to(device)
        for entry in dataclasses.fields(given)
        if isinstance(value := getattr(given, entry.name), Tensor)
    }
    return dataclasses.replace(given, **tensors)


def tolerance(x: Tensor, given: Stem) -> Tensor:
    """Return how far sums in float32 may lie from the exact ones, `[N, O, OH, OW]`.

    A sum of K terms in any order is off by at most K * 2^-24 times the sum of their magnitudes; as
    much again is left for the operands, of which a scaled pixel may be rounded differently.
    """
    signless = dataclasses.replace(
        given,
        weight=given.weight.abs(),
        bias=None if given.bias is None else given.bias.abs(),
        scale=None if given.scale is None else given.scale.abs(),
        offset=None if given.offset is None else given.offset.abs(),
        clamp_min=None,
        clamp_max=None,
    )
    terms = given.conv.reduction + 1
    size = apply_stem(x if x.dtype == torch.uint8 else x.abs(), signless)
    operand = 2.0**-24 if given.scale is None else torch.finfo(given.compute_dtype).eps / 2
    return size * (2 * terms * 2.0**-24 + 2 * operand)


def assert_agrees(x: Tensor, given: Stem, floats: Tensor, bits: Tensor) -> None:
    """Compare with the definition; bits where the value is not that close to its threshold."""
    v, near = apply_stem(x, given), tolerance(x, given)
    rounding = v.abs() * (torch.finfo(given.compute_dtype).eps if floats.dtype != v.dtype else 0)
    assert floats.dtype == given.compute_dtype
    assert floats.is_contiguous(memory_format=torch.channels_last)
    assert bool(((floats.cpu().float() - v).abs() <= near + rounding).all())
    limit = torch.zeros(v.shape[1]) if given.threshold is None else given.threshold
    limit, flipped = limit.view(1, -1, 1, 1), torch.zeros(v.shape[1], dtype=torch.bool)
    flipped = flipped if given.sense is None else given.sense
    expected = torch.where(flipped.view(1, -1, 1, 1), v <= limit, v >= limit)
    came = contract.unpack_channels(bits.cpu(), v.shape[1]).permute(0, 3, 1, 2)
    sure = (v - limit).abs() > near
    assert float(sure.float().mean()) > 0.9
    assert torch.equal(came & sure, expected & sure)
    used = contract.pack_channels(torch.ones(v.shape[1], dtype=torch.bool))
    assert bool(((bits.cpu() & ~used) == 0).all())


SHAPES = {
    "imagenet": (2, {}),
    "cifar": (2, {"kernel": 3, "stride": (1, 1), "pool": Pool2dGeometry()}),
    "few channels": (1, {"out": 5, "kernel": 3}),
    "odd channels": (3, {"out": 65, "kernel": 5, "stride": (2, 1), "padding": (0, 3, 1, 2)}),
    "no bias, clamp or threshold": (
        2,
        dict.fromkeys(("bias", "clamp_min", "clamp_max", "threshold", "sense")),
    ),
    "relu": (1, {"clamp_min": 0.0, "clamp_max": None}),
    "uneven pool": (
        1,
        {"pool": Pool2dGeometry(kernel_size=(2, 3), stride=(1, 2), padding=(1, 0))},
    ),
}


@pytest.mark.some(31)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_backend_agrees_with_the_definition(
    device: torch.device, need: Callable[..., None], shape: str, dtype: torch.dtype
) -> None:
    need("stem")
    batch, changes = SHAPES[shape]
    x, given = noise(batch, 3, 19, 22), parameters(compute_dtype=dtype, **changes)
    floats, bits = stem(x.to(device), on(device, given))
    assert_agrees(x, given, floats, bits)
    assert torch.equal(stem_bits(x.to(device), on(device, given)), bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["images", "channels last", "sliced"])
def test_images_may_be_bytes_or_floats_in_any_layout(
    device: torch.device, need: Callable[..., None], layout: str, dtype: torch.dtype
) -> None:
    need("stem")
    scale, offset = noise(3, seed=5).abs() / 60, noise(3, seed=6)
    for x in (pixels(2, 3, 19, 22), *(noise(2, 3, 19, 22).to(d) * 9 for d in DTYPES)):
        given = parameters(compute_dtype=dtype, scale=scale, offset=offset)
        moved = x.to(device)
        if layout == "channels last":
            moved = moved.contiguous(memory_format=torch.channels_last)
        if layout == "sliced":
            moved = torch.stack([moved, moved.flip(0)], -1)[..., 0]
        assert_agrees(x, given, *stem(moved, on(device, given)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 7), (5, 3)])
def test_the_classifier_agrees_with_the_definition_on_every_backend(
    device: torch.device, need: Callable[..., None], size: tuple[int, int], dtype: torch.dtype
) -> None:
    need("pooled_linear")
    x = noise(3, 70, *size).to(dtype)
    for weight, bias in (
        (noise(11, 70, seed=1), noise(11, seed=2)),
        (noise(11, 70, seed=1).to(dtype), None),
        (noise(1000, 70, seed=1).to(dtype), noise(1000, seed=2).to(dtype)),
    ):
        exact = x.double().mean((2, 3)) @ weight.double().t()
        size_of_terms = x.double().abs().mean((2, 3)) @ weight.double().abs().t()
        if bias is not None:
            exact, size_of_terms = exact + bias.double(), size_of_terms + bias.double().abs()
        operands = [t if t is None else t.to(device) for t in (x, weight, bias)]
        result = pooled_linear(*operands)
        assert result.dtype == dtype
        assert result.shape == exact.shape
        # Two sums of float32 in any order, and the rounding of the result.
        terms = 70 + size[0] * size[1] + 2
        near = size_of_terms * terms * 2.0**-24 + exact.abs() * torch.finfo(dtype).eps
        assert bool(((result.cpu().double() - exact).abs() <= near).all())


def test_the_reference_is_the_sum_of_the_rounded_operands_rounded_once() -> None:
    weight = torch.tensor([1.0, 2.0**-30, 2.0**-12 + 2.0**-20]).view(1, 3, 1, 1)
    x = torch.tensor([1.0, 1.0, 2.0**-12]).view(1, 3, 1, 1)
    given = Stem(weight=weight)
    exact = 1 + 2.0**-30 + 2.0**-24 + 2.0**-32  # above half an ulp of 1 in total only
    assert stem(x, given, backend="reference")[0].item() == 1 + 2.0**-23
    assert torch.tensor(exact, dtype=torch.float64).float().item() == 1 + 2.0**-23
    half = dataclasses.replace(given, compute_dtype=torch.float16)
    # 2^-30 is no float16, and 2^-12 + 2^-20 has no more than its 11 bits there.
    assert apply_stem(x, half).item() == 1.0 + 2.0**-23
    assert stem(x, half, backend="reference")[0].dtype == torch.float16


def test_padding_stays_zero_after_the_scale() -> None:
    x = torch.full((1, 1, 2, 2), 5.0)
    given = Stem(
        weight=torch.ones(1, 1, 3, 3),
        padding=(1, 1, 1, 1),
        scale=torch.tensor([2.0]),
        offset=torch.tensor([100.0]),
    )
    assert stem(x, given, backend="reference")[0].flatten().tolist() == [440.0] * 4


def test_padding_of_the_pool_never_wins() -> None:
    x = torch.full((1, 1, 2, 2), -5.0)
    given = Stem(weight=torch.ones(1, 1, 1, 1), pool=POOL)
    assert stem(x, given, backend="reference")[0].flatten().tolist() == [-5.0]


def test_bits_come_from_the_value_before_it_is_rounded() -> None:
    x = torch.ones(1, 1, 1, 1)
    given = Stem(
        weight=torch.ones(1, 1, 1, 1),
        bias=torch.tensor([-(2.0**-20)]),
        compute_dtype=torch.float16,
        threshold=torch.ones(1),
    )
    floats, bits = stem(x, given, backend="reference")
    assert (floats.item(), bits.item()) == (1.0, 0)


def test_a_float32_stem_is_the_convolution_of_torch_within_rounding() -> None:
    x, given = noise(2, 3, 20, 21), parameters()
    expected = F.conv2d(x, given.weight, given.bias, 2, 3)
    expected = F.hardtanh(F.max_pool2d(expected, 3, 2, 1))
    floats, _ = stem(x, given, backend="reference")
    assert bool(((floats - expected).abs() <= tolerance(x, given)).all())


def test_unwanted_outputs_are_left_out() -> None:
    x, given = noise(1, 3, 9, 9), parameters(want_float=False)
    reference = by_name("reference")
    floats, bits = reference.stem(x, given)
    assert floats is None
    assert bits is not None
    floats, bits = reference.stem(x, dataclasses.replace(given, want_float=True, want_bits=False))
    assert bits is None
    assert floats is not None


# -- who runs them, and what they refuse ----------------------------------------------------------


def test_the_table_of_schemas_has_every_operator_of_a_plan() -> None:
    assert tuple(PLAN_SCHEMAS) == PLAN_OPERATORS


def test_files_do_not_know_the_operators_of_a_plan() -> None:
    targets = {operator.target for operator in OPERATORS.values()}
    for op in PLAN_OPERATORS:
        assert getattr(torch.ops.biper, op).default not in targets
        assert f"biper.{op}" not in OPERATORS


@pytest.mark.parametrize("op", PLAN_OPERATORS)
def test_the_cpu_backend_refuses_with_its_reason(op: str) -> None:
    cpu = torch.device("cpu")
    reason = by_name("cpu").unsupported_reason(op, None, cpu)
    assert reason is not None
    assert "programs fuse the float ends" in reason
    assert select(op, None, cpu).name == "reference"
    with pytest.raises(BackendUnavailableError, match=f"cannot run {op}: this backend's programs"):
        stem_bits(noise(1, 3, 9, 9), parameters(), backend="cpu") if op == "stem_bits" else (
            stem(noise(1, 3, 9, 9), parameters(), backend="cpu")
            if op == "stem"
            else pooled_linear(noise(1, 3, 2, 2), noise(5, 3), backend="cpu")
        )


def test_a_backend_without_them_says_so() -> None:
    backend = by_name("reference")
    with pytest.raises(NotImplementedError, match="reference backend has no fused stem"):
        Backend.stem(backend, noise(1, 3, 9, 9), parameters())
    with pytest.raises(NotImplementedError, match="reference backend has no fused classifier"):
        Backend.pooled_linear(backend, noise(1, 3, 2, 2), noise(5, 3), None)


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "dtype of images": (
        noise(1, 3, 9, 9).double(),
        {},
        TypeError,
        r"`x.dtype` \(=torch.float64\) must be float32, float16, bfloat16 or uint8",
    ),
    "rank of images": (
        noise(3, 9, 9),
        {},
        GeometryError,
        r"`x` must be \[N, 3, H, W\] for weights .* \(40, 3, 7, 7\), but its shape is \(3, 9, 9\)",
    ),
    "channels of images": (
        noise(1, 4, 9, 9),
        {},
        GeometryError,
        r"`x` must be \[N, 3, H, W\] .* but its shape is \(1, 4, 9, 9\)",
    ),
    "rank of weights": (
        noise(1, 3, 9, 9),
        {"weight": noise(40, 3)},
        GeometryError,
        r"`weight` must be \[O, C, KH, KW\], but its shape is \(40, 3\)",
    ),
    "channels of weights": (
        noise(1, 5, 9, 9),
        {"weight": noise(40, 5, 3, 3)},
        GeometryError,
        r"`weight` must be \[O, C, KH, KW\] with C at most 4, .* is \(40, 5, 3, 3\)",
    ),
    "dtype of weights": (
        noise(1, 3, 9, 9),
        {"weight": noise(40, 3, 7, 7).half()},
        TypeError,
        "`weight` must be float32, but its dtype is torch.float16",
    ),
    "dtype of the stream": (
        noise(1, 3, 9, 9),
        {"compute_dtype": torch.float64},
        TypeError,
        r"`dtype` \(=torch.float64\) must be float32, float16 or bfloat16",
    ),
    "bias": (
        noise(1, 3, 9, 9),
        {"bias": noise(39)},
        GeometryError,
        r"`bias` must be \[40\], one value per channel, but its shape is \(39,\)",
    ),
    "dtype of thresholds": (
        noise(1, 3, 9, 9),
        {"threshold": noise(40).half()},
        TypeError,
        "`threshold` must be torch.float32, but its dtype is torch.float16",
    ),
    "scale alone": (
        noise(1, 3, 9, 9),
        {"scale": noise(3)},
        ValueError,
        "`scale` and `offset` must be given together",
    ),
    "offset of outputs": (
        noise(1, 3, 9, 9),
        {"scale": noise(3), "offset": noise(40)},
        GeometryError,
        r"`offset` must be \[3\], one value per channel, but its shape is \(40,\)",
    ),
    "kernel": (
        noise(1, 3, 2, 9),
        {"padding": (0, 0, 0, 0)},
        GeometryError,
        "A 7x7 kernel .* does not fit into a 2x9 image",
    ),
    "pool": (
        noise(1, 3, 1, 1),
        {"padding": (3, 3, 3, 3), "pool": Pool2dGeometry(kernel_size=(3, 3))},
        GeometryError,
        "A 3x3 pool does not fit into a 1x1 map",
    ),
    "stride": (
        noise(1, 3, 9, 9),
        {"stride": (0, 1)},
        GeometryError,
        r"`stride` \(=\(0, 1\)\) must be 2 integers, each at least 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_stem_refuses(case: str) -> None:
    x, changes, error, message = REFUSED[case]
    given = parameters(**changes)
    for call in (stem, stem_bits):
        with pytest.raises(error, match=message):
            call(x, given, backend="reference")


LINEAR_REFUSED: dict[str, tuple[tuple[Tensor, ...], type[Exception], str]] = {
    "dtype": (
        (noise(1, 4, 2, 2).double(), noise(5, 4)),
        TypeError,
        r"`x.dtype` \(=torch.float64\) must be float32, float16 or bfloat16",
    ),
    "no pixels": (
        (noise(1, 4, 0, 2), noise(5, 4)),
        GeometryError,
        r"`x` must have pixels, because their mean is taken, but its shape is \(1, 4, 0, 2\)",
    ),
    "weights": (
        (noise(1, 4, 2, 2), noise(5, 3)),
        GeometryError,
        r"`weight` must be \[K, 4\] for 4 channels, but its shape is \(5, 3\)",
    ),
    "bias": (
        (noise(1, 4, 2, 2), noise(5, 4), noise(4)),
        GeometryError,
        r"`bias` must be \[5\], but its shape is \(4,\)",
    ),
    "dtype of weights": (
        (noise(1, 4, 2, 2).half(), noise(5, 4).bfloat16()),
        TypeError,
        "`weight` must be torch.float16, as `x` is, or float32, but it is torch.bfloat16",
    ),
}


@pytest.mark.parametrize("case", LINEAR_REFUSED)
def test_what_the_classifier_refuses(case: str) -> None:
    operands, error, message = LINEAR_REFUSED[case]
    with pytest.raises(error, match=message):
        pooled_linear(*operands, backend="reference")
