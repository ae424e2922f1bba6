from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from biper_engine import bits as contract
from biper_engine.errors import GeometryError
from biper_engine.geometry import Conv2dGeometry
from biper_engine.ops import bconv2d, prepack
from biper_engine.ops.backends import by_name
from tests.ops.matrix import CONVOLUTIONS, geometry


@pytest.fixture(params=list(CONVOLUTIONS.values()), ids=list(CONVOLUTIONS))
def case(request: pytest.FixtureRequest) -> tuple[Conv2dGeometry, tuple[int, int]]:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.some(43)
def test_accumulators_are_those_of_a_float64_convolution(
    device: torch.device, need: Callable[..., None], operands: Any, case: Any
) -> None:
    conv, size = case
    need("bconv2d", conv)
    for batch in (3, 1, 0):
        data = operands(conv, size, batch)
        result = bconv2d(data.bits.to(device), data.weight.to(device), conv)
        assert result.dtype == torch.int32
        assert torch.equal(result.cpu(), data.dot)
        n, c, h, w = result.shape
        assert result.stride() == torch.empty(n, h, w, c).permute(0, 3, 1, 2).stride()


@pytest.mark.some(41)
def test_unused_bits_and_prepacked_weights_do_not_change_the_result(
    backend: str, device: torch.device, need: Callable[..., None], operands: Any, case: Any
) -> None:
    conv, size = case
    need("bconv2d", conv)
    data = operands(conv, size, 1)
    if conv.in_channels % 32:
        data.bits[..., -1] |= -1 << conv.in_channels % 32
    if conv.group_channels % 32:
        data.weight[..., -1] |= -1 << conv.group_channels % 32
    bits, weight = data.bits.to(device), data.weight.to(device)
    assert torch.equal(bconv2d(bits, weight, conv).cpu(), data.dot)
    prepacked = prepack(weight, conv, backend)
    assert torch.equal(bconv2d(bits, weight, conv, prepacked=prepacked).cpu(), data.dot)


SMALL = st.integers(1, 3)
PAIRS = st.tuples(SMALL, SMALL)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Conv2dGeometry, tuple[int, int]]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    conv = Conv2dGeometry(
        in_channels=groups * draw(st.integers(1, 70)),
        out_channels=groups * draw(SMALL),
        kernel_size=draw(PAIRS),
        stride=draw(PAIRS),
        padding=draw(st.tuples(*[st.integers(0, 3)] * 4)),
        dilation=draw(PAIRS),
        groups=groups,
    )
    size = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    try:
        conv.output_size(*size)
    except GeometryError:
        assume(False)
    return conv, size


@given(drawn=convolutions(), batch=st.integers(0, 2), seed=st.integers(0, 1000))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_convolution_is_that_of_float64(
    run: Any,
    operands: Any,
    drawn: tuple[Conv2dGeometry, tuple[int, int]],
    batch: int,
    seed: int,
) -> None:
    (conv, size), (name, device) = drawn, run
    assume(by_name(name).unsupported_reason("bconv2d", conv, device) is None)
    data = operands(conv, size, batch, seed)
    result = bconv2d(data.bits.to(device), data.weight.to(device), conv)
    assert torch.equal(result.cpu(), data.dot)


def popcount(words: Tensor) -> Tensor:
    """Return the set bits in the last dimension of int32 words, counted with all 32 places."""
    return contract.unpack_channels(words, 32 * words.shape[-1]).sum(-1, dtype=torch.int32)


def taps(packed: Tensor, conv: Conv2dGeometry, group: int) -> list[tuple[Tensor, Tensor]]:
    """Return, per tap, the group's words `[N, OH, OW, words]` and whether they are in the image.

    Padded words are 0.
    """
    per_group = conv.group_channels
    channels = contract.unpack_channels(packed, conv.in_channels)
    words = contract.pack_channels(channels[..., group * per_group : (group + 1) * per_group])
    top, bottom, left, right = conv.padding
    rows, columns = conv.output_size(packed.shape[1], packed.shape[2])
    padded = F.pad(words, (0, 0, left, right, top, bottom))
    inside = F.pad(torch.ones_like(words[..., 0]), (left, right, top, bottom)).bool()
    result = []
    for i in range(conv.kernel_size[0]):
        for j in range(conv.kernel_size[1]):
            first_row, first_column = i * conv.dilation[0], j * conv.dilation[1]
            y = slice(first_row, first_row + (rows - 1) * conv.stride[0] + 1, conv.stride[0])
            x = slice(
                first_column, first_column + (columns - 1) * conv.stride[1] + 1, conv.stride[1]
            )
            result.append((padded[:, y, x], inside[:, y, x]))
    return result


def valid_taps(conv: Conv2dGeometry, size: tuple[int, int]) -> Tensor:
    """Return the number of taps inside the image at every position, int32 [OH, OW]."""
    top, bottom, left, right = conv.padding
    image = F.pad(torch.ones(1, 1, *size), (left, right, top, bottom))
    ones = torch.ones(1, 1, *conv.kernel_size)
    return F.conv2d(image, ones, stride=conv.stride, dilation=conv.dilation)[0, 0].int()


def test_the_two_popcount_identities_give_the_accumulators(operands: Any, case: Any) -> None:
    conv, size = case
    data = operands(conv, size, 2)
    valid = valid_taps(conv, size) * conv.group_channels
    dot = bconv2d(data.bits, data.weight, conv, backend="reference")
    for channel in range(conv.out_channels):
        group = channel // (conv.out_channels // conv.groups)
        filters = data.weight[channel].reshape(conv.taps, -1)
        windows = taps(data.bits, conv, group)
        by_xor, by_and = valid.clone(), valid.clone()
        for weight, (a, inside) in zip(filters, windows, strict=True):
            by_xor = by_xor - 2 * popcount(a ^ weight) * inside
            by_and = by_and + 4 * popcount(a & weight) - 2 * popcount(a)
            by_and = by_and - 2 * popcount(weight) * inside
        assert torch.equal(by_xor, dot[:, channel])
        assert torch.equal(by_and, dot[:, channel])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_extreme_accumulators_are_exact(
    device: torch.device, need: Callable[..., None], sign: int
) -> None:
    conv = geometry(in_channels=8191, out_channels=2, kernel_size=(3, 3), padding=(1, 1, 1, 1))
    need("bconv2d", conv)
    ones = contract.pack_channels(torch.ones(1, 3, 3, 8191, dtype=torch.bool)).to(device)
    same = torch.full((2, 8191, 3, 3), sign > 0)
    result = bconv2d(ones, contract.pack_weight(same).to(device), conv)
    expected = sign * 8191 * valid_taps(conv, (3, 3))
    assert torch.equal(result.cpu(), expected.expand(1, 2, 3, 3))


def test_strides_do_not_change_the_result(
    device: torch.device, need: Callable[..., None], operands: Any
) -> None:
    conv = geometry(in_channels=65, padding=(1, 1, 1, 1))
    need("bconv2d", conv)
    data = operands(conv, (5, 6), 2)
    bits = torch.zeros(4, 6, 10, 6, dtype=torch.int32, device=device)[::2, :, ::2, ::2]
    bits = bits.permute(0, 2, 1, 3)
    bits.copy_(data.bits)
    weight = torch.zeros(3, 3, 3, 5, dtype=torch.int32, device=device).permute(3, 0, 1, 2)
    weight.copy_(data.weight)
    assert not bits.is_contiguous()
    assert not weight.is_contiguous()
    assert torch.equal(bconv2d(bits, weight, conv).cpu(), data.dot)


def test_operands_are_left_alone(
    backend: str, device: torch.device, need: Callable[..., None], operands: Any
) -> None:
    conv = geometry(padding=(1, 0, 1, 0))
    need("bconv2d", conv)
    data = operands(conv, (4, 4), 2)
    tensors = [data.bits.to(device), data.weight.to(device)]
    tensors.append(prepack(tensors[1], conv, backend))
    copies = [tensor.clone() for tensor in tensors]
    bconv2d(tensors[0], tensors[1], conv, prepacked=tensors[2])
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    assert tensors[2].data_ptr() != tensors[1].data_ptr()  # an operator's result is no alias


def test_a_linear_layer_is_a_1x1_convolution(
    device: torch.device, need: Callable[..., None], operands: Any
) -> None:
    conv = geometry(in_channels=100, out_channels=10, kernel_size=(1, 1))
    need("bconv2d", conv)
    data = operands(conv, (1, 1), 4)
    expected = F.linear(data.signs.flatten(1), data.weight_signs.flatten(1))
    result = bconv2d(data.bits.to(device), data.weight.to(device), conv)
    assert torch.equal(result.cpu().flatten(1), expected.to(torch.int32))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("channels", [33, 64])
def test_pixels_of_many_images_are_multiplied_alike(
    device: torch.device,
    need: Callable[..., None],
    operands: Any,
    monkeypatch: pytest.MonkeyPatch,
    channels: int,
    threads: int,
) -> None:
    conv = Conv2dGeometry(in_channels=channels, out_channels=70, kernel_size=(1, 1))
    need("bconv2d", conv)
    monkeypatch.setenv("BIPER_NUM_THREADS", str(threads))
    for batch, size in ((70, (1, 1)), (7, (1, 5)), (5, (3, 2)), (0, (2, 2))):
        case = operands(conv, size, batch)
        dot = bconv2d(case.bits.to(device), case.weight.to(device), conv)
        assert torch.equal(dot.cpu(), case.dot)


@pytest.mark.some(3)
@pytest.mark.parametrize("threads", [1, 2])
def test_weights_that_caches_do_not_hold_give_the_same_accumulators(
    device: torch.device,
    backend: str,
    need: Callable[..., None],
    operands: Any,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
) -> None:
    conv = Conv2dGeometry(in_channels=2065, out_channels=2050, kernel_size=(1, 1))  # 66 words each
    need("bconv2d", conv)
    monkeypatch.setenv("BIPER_NUM_THREADS", str(threads))
    for batch in (1, 6):
        case = operands(conv, (1, 1), batch)
        prepacked = prepack(case.weight.to(device), conv, backend)
        dot = bconv2d(case.bits.to(device), case.weight.to(device), conv, prepacked=prepacked)
        assert torch.equal(dot.cpu(), case.dot)
