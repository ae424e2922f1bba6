"""Products of two packed maps, and of real rows with binary weights, on every backend."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from biper_engine.bits import pack_channels, pack_weight
from biper_engine.errors import GeometryError
from biper_engine.ops import (
    MatrixScale,
    MatrixShape,
    bmatmul,
    bmatmul_float,
    unpack_weight,
    weight_linear,
)
from biper_engine.ops.backends import Backend
from biper_engine.ops.cuda import CudaBackend
from biper_engine.ops.matrix import MATRIX_OPERATORS
from biper_engine.ops.triton import TritonBackend
from tests.images import noise

LOWS = list(itertools.product((-1, 0), repeat=2))
SIZES = [1, 31, 32, 33, 63, 65, 127]
SCALE = MatrixScale(0.3, 0.21, -0.17, 3.3)


def random_bits(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def elements(positive: Tensor, low: int, groups: int) -> Tensor:
    """Return elements [N, H, groups, W, depth] in float64."""
    values = torch.where(positive, 1.0, float(low)).double()
    return values.unflatten(-1, (groups, -1)).transpose(2, 3)


def product(a: Tensor, b: Tensor, shape: MatrixShape) -> Tensor:
    """Return the sums in float64, [N, V, H * groups, W]."""
    left = elements(a, shape.low_a, shape.groups)
    right = elements(b, shape.low_b, shape.groups)
    return (left @ right.transpose(-1, -2)).flatten(1, 2).permute(0, 3, 1, 2)


def maps(channels: int, width: int, other: int) -> tuple[Tensor, Tensor]:
    return random_bits(2, 3, width, channels), random_bits(2, 3, other, channels, seed=1)


def check(
    a: Tensor, b: Tensor, shape: MatrixShape, device: torch.device, same: Callable[..., bool]
) -> None:
    packed = [pack_channels(x).to(device) for x in (a, b)]
    sums = bmatmul(*packed, shape)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.cpu().double(), product(a, b, shape))
    scaled = bmatmul_float(*packed, shape, SCALE)
    on_cpu = [x.cpu() for x in packed]
    assert same(scaled, bmatmul_float(*on_cpu, shape, SCALE, backend="reference"))


@pytest.mark.some(41)
@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("channels", SIZES)
def test_sums_are_exact_for_any_number_of_channels(
    device: torch.device,
    need: Callable[..., None],
    same_bytes: Callable[..., bool],
    channels: int,
    low: tuple[int, int],
) -> None:
    need("bmatmul")
    check(*maps(channels, 5, 4), MatrixShape(channels, 1, *low), device, same_bytes)


@pytest.mark.some(38)
@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("other", SIZES)
def test_sums_are_exact_for_any_number_of_pixels(
    device: torch.device,
    need: Callable[..., None],
    same_bytes: Callable[..., bool],
    other: int,
    low: tuple[int, int],
) -> None:
    need("bmatmul")
    check(*maps(40, 9, other), MatrixShape(40, 1, *low), device, same_bytes)
    check(*maps(40, other, 9), MatrixShape(40, 1, *low), device, same_bytes)


@pytest.mark.parametrize(("channels", "groups"), [(64, 2), (66, 2), (60, 4), (33, 33), (192, 3)])
def test_groups_are_products_of_their_own(
    device: torch.device,
    need: Callable[..., None],
    same_bytes: Callable[..., bool],
    channels: int,
    groups: int,
) -> None:
    need("bmatmul")
    for low in LOWS:
        check(*maps(channels, 5, 7), MatrixShape(channels, groups, *low), device, same_bytes)


def test_more_elements_than_one_pass_counts(
    device: torch.device, need: Callable[..., None], same_bytes: Callable[..., bool]
) -> None:
    need("bmatmul")
    check(*maps(1100, 3, 3), MatrixShape(1100), device, same_bytes)


def test_many_rows_of_a_large_product_are_cut_without_a_trace(
    device: torch.device, need: Callable[..., None], same_bytes: Callable[..., bool]
) -> None:
    need("bmatmul")
    check(*maps(96, 200, 130), MatrixShape(96, 1, 0, -1), device, same_bytes)


def test_empty_products_are_empty(device: torch.device, need: Callable[..., None]) -> None:
    need("bmatmul")
    for n, w, v in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        a, b = (torch.zeros(n, 1, p, 2, dtype=torch.int32, device=device) for p in (w, v))
        assert bmatmul(a, b, MatrixShape(40)).shape == (n, v, 1, w)
        assert bmatmul_float(a, b, MatrixShape(40), SCALE).shape == (n, v, 1, w)


def test_unused_bits_do_not_change_the_result(
    device: torch.device, need: Callable[..., None]
) -> None:
    need("bmatmul")
    a, b = (pack_channels(x).to(device) for x in maps(33, 4, 5))
    for low in LOWS:
        shape = MatrixShape(33, 1, *low)
        clean = bmatmul_float(a, b, shape, SCALE)
        dirty = [x.clone() for x in (a, b)]
        for x in dirty:
            x[..., -1] |= -2
        assert torch.equal(bmatmul_float(*dirty, shape, SCALE), clean)


def test_a_product_of_zeros_is_exactly_zero(
    device: torch.device, need: Callable[..., None]
) -> None:
    need("bmatmul_float")
    a = torch.zeros(1, 1, 3, 7, dtype=torch.int32, device=device)
    b = pack_channels(random_bits(1, 1, 9, 197)).to(device)
    v = bmatmul_float(a, b, MatrixShape(197, 1, 0, -1), MatrixScale(0.01))
    assert torch.equal(v.cpu(), torch.zeros(1, 9, 1, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(
    device: torch.device, need: Callable[..., None], dtype: torch.dtype
) -> None:
    need("bmatmul_float")
    a, b = (pack_channels(x).to(device) for x in maps(70, 6, 21))
    exact = bmatmul_float(a, b, MatrixShape(70), SCALE)
    assert torch.equal(bmatmul_float(a, b, MatrixShape(70), SCALE, dtype=dtype), exact.to(dtype))


def test_shapes_that_do_not_fit_are_refused() -> None:
    a, b = (pack_channels(x) for x in maps(40, 4, 5))
    for shape in (MatrixShape(80), MatrixShape(40, 3), MatrixShape(40, 1, 1), MatrixShape(40, 0)):
        with pytest.raises(GeometryError):
            bmatmul(a, b, shape)
    with pytest.raises(GeometryError, match="same numbers of images and rows"):
        bmatmul(a[:1], b, MatrixShape(40))
    with pytest.raises(ValueError, match="multiplier"):
        bmatmul_float(a, b, MatrixShape(40), MatrixScale(1e39))


# -- binary weights -------------------------------------------------------------------------------


def sign_rows(positive: Tensor) -> Tensor:
    return pack_weight(positive[..., None, None])[:, 0, 0]


def layer(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the bits of a layer, and multiplier, bias and offset of its outputs."""
    vectors = (noise(outputs, seed=seed) for seed in (2, 3, 4))
    return random_bits(outputs, inputs, seed=outputs), *vectors  # type: ignore[return-value]


@pytest.mark.some(27)
@pytest.mark.parametrize("inputs", [*SIZES, 2, 3, 4, 5, 6, 29, 30, 239, 240, 241, 600])
def test_a_linear_layer_has_the_bytes_of_the_reference(
    device: torch.device,
    need: Callable[..., None],
    same_bytes: Callable[..., bool],
    inputs: int,
) -> None:
    need("weight_linear")
    positive, multiplier, bias, offset = layer(67, inputs)
    weight, most = sign_rows(positive), noise(5, inputs, seed=inputs)
    for options in ((None, None), (bias, None), (None, offset), (bias, offset)):
        held = [None if t is None else t.to(device) for t in (weight, multiplier, *options)]
        wanted = weight_linear(most, weight, multiplier, *options, backend="reference")
        for rows in (0, 1, 2, 3, 5):
            v = weight_linear(most[:rows].to(device), *held)
            assert same_bytes(v, wanted[:rows]), f"{rows} rows"


@pytest.mark.parametrize("outputs", [*SIZES, 200])
def test_any_number_of_outputs_has_the_bytes_of_the_reference(
    device: torch.device, need: Callable[..., None], same_bytes: Callable[..., bool], outputs: int
) -> None:
    need("weight_linear")
    positive, multiplier, bias, offset = layer(outputs, 70)
    x, held = noise(2, 3, 70), (sign_rows(positive), multiplier, bias, offset)
    v = weight_linear(x.to(device), *(t.to(device) for t in held))
    assert v.shape == (2, 3, outputs)
    assert same_bytes(v, weight_linear(x, *held, backend="reference"))


@pytest.mark.parametrize("inputs", [1, 33, 300, 1000])
def test_a_linear_layer_is_that_of_float64_within_rounding(inputs: int) -> None:
    positive, multiplier, bias, offset = layer(20, inputs)
    x = noise(3, inputs, seed=1)
    signs = positive.double() * 2 - 1
    weight = offset.double()[:, None] + multiplier.double()[:, None] * signs
    wanted = x.double() @ weight.t() + bias.double()
    v = weight_linear(x, sign_rows(positive), multiplier, bias, offset, backend="reference")
    # Additions of a sum: 3 in a table, 48 in a chain, one for each chain, and 3 after it; each
    # rounds by 2^-24 of sums that are at most the sum of magnitudes.
    roundings = 3 + 48 + -(-inputs // 240) + 3
    magnitude = x.abs().double() @ (multiplier.abs() + offset.abs()).double().expand(inputs, 20)
    bound = roundings * 2.0**-24 * (magnitude + bias.abs().double())
    assert bool(((v.double() - wanted).abs() <= bound).all())


def test_threads_and_rows_do_not_change_the_bytes(
    device: torch.device,
    need: Callable[..., None],
    same_bytes: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need("weight_linear")
    positive, multiplier, bias, offset = layer(300, 900)
    held = [t.to(device) for t in (sign_rows(positive), multiplier, bias, offset)]
    x = noise(7, 900).to(device)
    whole = weight_linear(x, *held)
    for threads in (1, 2, 3):
        monkeypatch.setenv("BIPER_NUM_THREADS", str(threads))
        assert same_bytes(weight_linear(x, *held), whole)
        rows = [weight_linear(row[None], *held) for row in x]
        assert same_bytes(torch.cat(rows), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows_are_multiplied_in_float32(
    device: torch.device, need: Callable[..., None], dtype: torch.dtype
) -> None:
    need("weight_linear")
    positive, multiplier, bias, _ = layer(9, 50)
    held = [t.to(device) for t in (sign_rows(positive), multiplier, bias)]
    x = noise(4, 50).to(device, dtype)
    v = weight_linear(x, *held)
    assert torch.equal(v, weight_linear(x.float(), *held).to(dtype))


def test_weights_are_unpacked_to_two_values_of_each_output(device: torch.device) -> None:
    positive = random_bits(5, 33, 3, 2)
    low, high = noise(5, seed=1), noise(5, seed=2)
    packed = pack_weight(positive).to(device)
    weight = unpack_weight(packed, low.to(device), high.to(device), 33, backend=None)
    one, zero = (values.view(-1, 1, 1, 1) for values in (high, low))
    assert torch.equal(weight.cpu(), torch.where(positive, one, zero))


def test_operands_that_do_not_fit_are_refused() -> None:
    positive, multiplier, _, _ = layer(5, 40)
    weight = sign_rows(positive)
    for wrong in (weight[:, :1], weight[None]):
        with pytest.raises(GeometryError, match="weight"):
            weight_linear(noise(2, 40), wrong, multiplier)
    with pytest.raises(GeometryError, match="multiplier"):
        weight_linear(noise(2, 40), weight, multiplier[:4])
    with pytest.raises(TypeError, match="weight"):
        weight_linear(noise(2, 40), weight.long(), multiplier)


@pytest.mark.parametrize("op", MATRIX_OPERATORS)
@pytest.mark.parametrize("backend", [CudaBackend(), TritonBackend()], ids=lambda x: x.name)
def test_backends_for_gpus_say_that_they_have_no_kernel(backend: Backend, op: str) -> None:
    reason = backend.unsupported_reason(op, None, torch.device("cuda"))
    assert reason == "it has no kernel for products of matrices"
