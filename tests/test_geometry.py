import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from biper_engine.bits import words
from biper_engine.errors import GeometryError
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry

PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))
PADDINGS = st.tuples(*[st.integers(0, 5)] * 4)
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def geometry(**changes: Any) -> Conv2dGeometry:
    defaults = {"in_channels": 1, "out_channels": 1, "kernel_size": (3, 3)}
    return Conv2dGeometry(**{**defaults, **changes})


@given(SIZES, PAIRS, PAIRS, PADDINGS, PAIRS)
@settings(max_examples=200)
def test_output_size_is_that_of_a_convolution_of_ones(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> None:
    conv = geometry(kernel_size=kernel, stride=stride, padding=padding, dilation=dilation)
    top, bottom, left, right = padding
    image = F.pad(torch.ones(1, 1, *size, dtype=torch.float64), (left, right, top, bottom))
    filters = torch.ones(1, 1, *kernel, dtype=torch.float64)
    try:
        expected = F.conv2d(image, filters, stride=stride, dilation=dilation)
    except RuntimeError:
        with pytest.raises(GeometryError, match="does not fit"):
            conv.output_size(*size)
        return
    assert conv.output_size(*size) == expected.shape[2:]
    assert conv.macs(*size) == expected.numel() * conv.taps


@given(SIZES, PAIRS, PAIRS, st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_pool_output_size_is_that_of_max_pool2d(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    assume(all(2 * p <= k for p, k in zip(padding, kernel, strict=True)))
    window = Pool2dGeometry(kernel_size=kernel, stride=stride, padding=padding)
    try:
        expected = F.max_pool2d(torch.zeros(1, 1, *size), kernel, stride, padding)
    except RuntimeError:
        with pytest.raises(GeometryError, match=r"pool does not fit into a \d+x\d+ map"):
            window.output_size(*size)
        return
    assert window.output_size(*size) == expected.shape[2:]
    assert expected.isfinite().all()  # padding never wins, so no window lies in it


@given(PAIRS, st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_a_pool_accepts_the_paddings_that_max_pool2d_accepts(
    kernel: tuple[int, int], padding: tuple[int, int]
) -> None:
    try:
        F.max_pool2d(torch.zeros(1, 1, 12, 12), kernel, 1, padding)
    except RuntimeError:
        with pytest.raises(GeometryError, match="at most half of `kernel_size`"):
            Pool2dGeometry(kernel_size=kernel, padding=padding)
    else:
        Pool2dGeometry(kernel_size=kernel, padding=padding)


def test_derived_quantities_follow_from_the_shape() -> None:
    conv = geometry(in_channels=66, out_channels=4, kernel_size=(3, 5), groups=2)
    assert conv.group_channels == 33
    assert conv.taps == 15
    assert conv.reduction == 15 * 33
    assert conv.weight_shape == (4, 3, 5, words(33))
    assert conv.macs(7, 9) == 5 * 5 * 4 * 15 * 33


def pool(**options: Any) -> Pool2dGeometry:
    return Pool2dGeometry(**options)


def test_geometries_from_lists_equal_and_hash_like_those_from_tuples() -> None:
    conv = geometry(kernel_size=[3, 3], stride=[2, 2], padding=[1, 2, 3, 4], dilation=[1, 1])
    same = geometry(stride=(2, 2), padding=(1, 2, 3, 4))
    assert conv == same
    assert hash(conv) == hash(same)
    assert Conv2dGeometry(**dataclasses.asdict(conv)) == conv
    assert hash(pool(kernel_size=[2, 2])) == hash(pool(kernel_size=(2, 2)))


def test_only_the_pool_of_one_value_is_the_identity() -> None:
    assert Pool2dGeometry().is_identity
    assert pool(kernel_size=[1, 1], stride=[1, 1], padding=[0, 0]).is_identity
    assert not Pool2dGeometry(stride=(2, 1)).is_identity
    assert not Pool2dGeometry(kernel_size=(1, 2)).is_identity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kernel_size": (0, 3)},
            r"`kernel_size` \(=\(0, 3\)\) must be 2 integers, each at least 1",
        ),
        ({"kernel_size": (3,)}, r"`kernel_size` \(=\(3,\)\) must be 2 integers"),
        ({"kernel_size": 3}, r"`kernel_size` \(=3\) must be 2 integers"),
        ({"kernel_size": (3.0, 3)}, r"`kernel_size` \(=\(3.0, 3\)\) must be 2 integers"),
        ({"stride": (1, 0)}, r"`stride` \(=\(1, 0\)\) must be 2 integers, each at least 1"),
        ({"padding": (1, 1)}, r"`padding` \(=\(1, 1\)\) must be 4 integers, each at least 0"),
        ({"padding": (0, 0, -1, 0)}, r"`padding` .* must be 4 integers, each at least 0"),
        ({"dilation": (0, 1)}, r"`dilation` \(=\(0, 1\)\) must be 2 integers, each at least 1"),
        ({"in_channels": 0}, r"`in_channels` \(=0\) and `out_channels` \(=1\) must be at least 1"),
        ({"out_channels": 0}, r"`in_channels` \(=1\) and `out_channels` \(=0\) must be at least 1"),
        ({"groups": 0}, r"divisible by `groups` \(=0\)"),
        (
            {"in_channels": 3, "out_channels": 4, "groups": 2},
            r"`in_channels` \(=3\).*`groups` \(=2\)",
        ),
        (
            {"in_channels": 4, "out_channels": 3, "groups": 2},
            r"`out_channels` \(=3\).*`groups` \(=2\)",
        ),
        (
            {"in_channels": 1 << 20, "kernel_size": (4, 4)},
            r"\(=16777216\) must be below 16777216, so that every accumulator is exact",
        ),
    ],
)
def test_impossible_convolutions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        geometry(**changes)


def test_the_largest_exact_reduction_is_accepted() -> None:
    assert geometry(in_channels=(1 << 24) - 1, kernel_size=(1, 1)).reduction == (1 << 24) - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kernel_size": (2, 0)},
            r"`kernel_size` \(=\(2, 0\)\) must be 2 integers, each at least 1",
        ),
        ({"stride": (0, 1)}, r"`stride` \(=\(0, 1\)\) must be 2 integers, each at least 1"),
        ({"padding": (-1, 0)}, r"`padding` \(=\(-1, 0\)\) must be 2 integers, each at least 0"),
        ({"padding": (0, 1)}, r"`padding` \(=\(0, 1\)\) of a pool must be at most half"),
    ],
)
def test_impossible_pools_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        Pool2dGeometry(**changes)


def test_a_kernel_that_does_not_fit_is_refused_with_both_sizes() -> None:
    conv = geometry(padding=(1, 0, 0, 0), dilation=(2, 2))
    message = (
        r"3x3 kernel with dilation \(2, 2\) does not fit into a 4x4 image padded by \(1, 0, 0, 0\)"
    )
    with pytest.raises(GeometryError, match=message):
        conv.output_size(4, 4)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0)])
def test_an_empty_image_is_refused_even_where_the_padding_would_hold_the_kernel(
    height: int, width: int
) -> None:
    conv = geometry(padding=(3, 3, 3, 3))
    with pytest.raises(GeometryError, match=f"does not fit into a {height}x{width} image"):
        conv.output_size(height, width)
    window = Pool2dGeometry(kernel_size=(2, 2), padding=(1, 1))
    with pytest.raises(GeometryError, match=f"does not fit into a {height}x{width} map"):
        window.output_size(height, width)
