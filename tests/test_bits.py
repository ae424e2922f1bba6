import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from biper_engine import bits
from biper_engine.errors import GeometryError

CHANNELS = (0, 1, 31, 32, 33, 63, 64, 65, 127)
SMALLEST_DENORMAL = 2.0**-149


def random_bits(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(0, 0), (1, 1), (31, 1), (32, 1), (33, 2), (63, 2), (64, 2), (65, 3), (127, 4)],
)
def test_words_round_up(channels: int, expected: int) -> None:
    assert bits.words(channels) == expected


@pytest.mark.parametrize("channels", CHANNELS)
def test_packing_round_trips(channels: int) -> None:
    values = random_bits(2, 3, channels)
    packed = bits.pack_channels(values)
    assert packed.dtype == torch.int32
    assert packed.shape == (2, 3, bits.words(channels))
    assert packed.is_contiguous()
    assert torch.equal(bits.unpack_channels(packed, channels), values)


@pytest.mark.parametrize("channels", [1, 32, 33, 65])
def test_every_channel_has_its_own_place(channels: int) -> None:
    packed = bits.pack_channels(torch.eye(channels, dtype=torch.bool))
    for channel in range(channels):
        for word in range(bits.words(channels)):
            expected = 1 << channel % 32 if word == channel // 32 else 0
            assert int(packed[channel, word]) & 0xFFFFFFFF == expected


@pytest.mark.parametrize("channels", [1, 31, 33, 63, 65, 127])
def test_unused_bits_are_zero(channels: int) -> None:
    packed = bits.pack_channels(torch.ones(channels, dtype=torch.bool))
    assert int(packed[-1]) & 0xFFFFFFFF == (1 << channels % 32) - 1


@pytest.mark.parametrize("channels", [1, 31, 33, 63, 65, 127])
def test_unused_bits_do_not_change_what_is_unpacked(channels: int) -> None:
    values = random_bits(4, channels)
    packed = bits.pack_channels(values)
    packed[..., -1] |= -1 << channels % 32
    assert torch.equal(bits.unpack_channels(packed, channels), values)


@given(st.lists(st.booleans(), max_size=130))
def test_packing_is_the_sum_of_powers_of_two(values: list[bool]) -> None:
    packed = bits.pack_channels(torch.tensor(values, dtype=torch.bool))
    number = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(packed.tolist()))
    assert number == sum(1 << place for place, value in enumerate(values) if value)
    assert bits.unpack_channels(packed, len(values)).tolist() == values


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4))
def test_full_words_survive_unpacking(values: list[int]) -> None:
    packed = torch.tensor(values, dtype=torch.int32)
    assert torch.equal(bits.pack_channels(bits.unpack_channels(packed, 32 * len(values))), packed)


def test_packing_ignores_strides_and_leaves_its_input_alone() -> None:
    values = random_bits(5, 40, 3)
    copy = values.clone()
    packed = bits.pack_channels(values.permute(2, 0, 1))
    assert packed.is_contiguous()
    assert torch.equal(packed, bits.pack_channels(values.permute(2, 0, 1).contiguous()))
    assert torch.equal(
        bits.unpack_channels(packed.expand(2, 3, 5, 2)[:, ::2], 33)[0, 0], copy[:, :33, 0]
    )
    assert torch.equal(values, copy)


@pytest.mark.parametrize("shape", [(0, 33), (2, 0, 33), (0, 0)])
def test_empty_tensors_pack(shape: tuple[int, ...]) -> None:
    packed = bits.pack_channels(torch.zeros(shape, dtype=torch.bool))
    assert packed.shape == (*shape[:-1], bits.words(shape[-1]))
    assert bits.unpack_channels(packed, shape[-1]).shape == shape


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 63, 64, 65, 127])
def test_weights_round_trip_in_the_canonical_layout(channels: int) -> None:
    positive = random_bits(3, channels, 2, 5)
    packed = bits.pack_weight(positive)
    assert packed.shape == (3, 2, 5, bits.words(channels))
    assert packed.is_contiguous()
    assert torch.equal(bits.unpack_weight(packed, channels), positive)
    channel = channels - 1
    bit = (packed[2, 1, 4, channel // 32] >> channel % 32) & 1
    assert bool(bit) == bool(positive[2, channel, 1, 4])


@pytest.mark.parametrize(("held", "asked"), [(1, 33), (2, 32), (1, 0)])
def test_unpacking_the_wrong_number_of_words_says_what_was_wanted(held: int, asked: int) -> None:
    packed = torch.zeros(4, held, dtype=torch.int32)
    message = (
        rf"{asked} channels fill {bits.words(asked)} words of 32 bits.*has {held}.*\(4, {held}\)"
    )
    with pytest.raises(GeometryError, match=message):
        bits.unpack_channels(packed, asked)


@pytest.mark.parametrize(
    ("value", "bit"),
    [
        (0.0, True),
        (-0.0, True),
        (SMALLEST_DENORMAL, True),
        (-SMALLEST_DENORMAL, False),
        (torch.inf, True),
        (-torch.inf, False),
        (torch.nan, False),
        (1.0, True),
        (-1.0, False),
    ],
)
def test_a_bit_is_at_least_zero(value: float, bit: bool) -> None:
    assert bits.binarize(torch.tensor([value])).tolist() == [bit]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_smallest_denormal_of_every_dtype_is_positive(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    values = torch.tensor([tiny, -tiny, 0.0, -0.0], dtype=dtype)
    assert values[0] > 0
    assert bits.binarize(values).tolist() == [True, False, True, True]


def test_a_threshold_of_the_smallest_denormal_means_positive() -> None:
    values = torch.tensor([0.0, -0.0, SMALLEST_DENORMAL, -SMALLEST_DENORMAL, 1.0])
    limit = torch.tensor([SMALLEST_DENORMAL])
    assert bits.binarize(values, limit).tolist() == [False, False, True, False, True]


def test_threshold_and_sense_act_per_channel() -> None:
    values = torch.tensor([[-1.0, 0.0, 0.5, 1.0]]).expand(4, 4).T  # value by row
    threshold = torch.tensor([0.5, 0.5, torch.inf, -torch.inf])
    sense = torch.tensor([False, True, False, False])
    assert bits.binarize(values, threshold, sense).tolist() == [
        [False, True, False, True],
        [False, True, False, True],
        [True, True, False, True],
        [True, False, False, True],
    ]


def test_infinite_thresholds_are_constants_of_every_finite_value() -> None:
    values = torch.tensor([-3.0e38, 0.0, 3.0e38])
    for threshold, sense, expected in (
        (torch.inf, False, False),
        (torch.inf, True, True),
        (-torch.inf, False, True),
        (-torch.inf, True, False),
    ):
        result = bits.binarize(values, torch.tensor(threshold), torch.tensor(sense))
        assert result.tolist() == [expected] * 3


def test_nan_gives_0_under_either_sense() -> None:
    values = torch.full((2,), torch.nan)
    assert bits.binarize(values, None, torch.tensor([False, True])).tolist() == [False, False]
    assert bits.binarize(torch.zeros(2), values, torch.tensor([False, True])).tolist() == [
        False,
        False,
    ]


def test_sense_without_threshold_compares_with_zero() -> None:
    values = torch.tensor([-1.0, -0.0, 0.0, 1.0])
    assert bits.binarize(values, None, torch.tensor(True)).tolist() == [True, True, True, False]


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_threshold_is_not_rounded_to_the_dtype_of_the_values(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    just_above_one = torch.full(shape, 1 + 2.0**-20)
    values = torch.ones(3, dtype=dtype)
    assert not bits.binarize(values, just_above_one).any()
    assert bits.binarize(values, just_above_one, torch.tensor(True)).all()


@given(
    st.floats(width=32, allow_nan=False),
    st.floats(width=32, allow_nan=False),
    st.booleans(),
)
def test_a_bit_is_a_float32_comparison(value: float, threshold: float, sense: bool) -> None:
    result = bits.binarize(torch.tensor(value), torch.tensor(threshold), torch.tensor(sense))
    assert bool(result) == (value <= threshold if sense else value >= threshold)
