"""Native code also checks its arguments: malformed arguments raise errors and never crash."""

from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine.ops.backends import backends
from biper_engine.ops.cpu_program import CpuProgram
from biper_engine.ops.native_arguments import native_memory

REASON = {info.name: info.reason for info in backends()}["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"cpu: {REASON}")

GEOMETRY = (64, 32, 1, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1)
"""in, out, groups, kernel, stride, padding (4), dilation; see `_geometry_values`."""


def changed(**values: int) -> tuple[int, ...]:
    names = (
        *("in_channels", "out_channels", "groups", "kernel_h", "kernel_w", "stride_h", "stride_w"),
        *("top", "bottom", "left", "right", "dilation_h", "dilation_w"),
    )
    return tuple(values.get(name, GEOMETRY[i]) for i, name in enumerate(names))


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "groups", "kernel_h", "stride_w"])
@pytest.mark.parametrize("value", [0, -1, -(2**62), 2**31, 2**62])
def test_a_malformed_geometry_is_an_error(name: str, value: int) -> None:
    from biper_engine import _cpu

    with pytest.raises(ValueError, match=r"must be from|must divide"):
        _cpu.prepacked_words(changed(**{name: value}))


@pytest.mark.parametrize("name", ["top", "left", "right", "dilation_h"])
@pytest.mark.parametrize("value", [-1, 2**31, 2**62])
def test_malformed_padding_and_dilation_are_errors(name: str, value: int) -> None:
    from biper_engine import _cpu

    with pytest.raises(ValueError, match=r"`(padding|dilation)` .* must be from"):
        _cpu.prepacked_words(changed(**{name: value}))


def test_groups_must_divide_the_channels() -> None:
    from biper_engine import _cpu

    with pytest.raises(ValueError, match="`groups` must divide"):
        _cpu.prepacked_words(changed(groups=3))
    with pytest.raises(ValueError, match=r"fewer than 2\^24"):
        _cpu.prepacked_words(changed(in_channels=2**23))


@pytest.fixture
def native_conv() -> tuple[Any, Tensor, Tensor]:
    """Return a native convolution with its weights, and an input of 5x6."""
    from biper_engine import _cpu

    weight = torch.zeros(32 * 9 * 2, dtype=torch.int32)
    prepacked = torch.zeros(_cpu.prepacked_words(GEOMETRY), dtype=torch.int32)
    _cpu.prepack(GEOMETRY, memory(weight), memory(prepacked))
    return _cpu.Conv(GEOMETRY, memory(prepacked)), prepacked, torch.zeros(60, dtype=torch.int32)


TYPES = {torch.float32: 1, torch.int32: 5, torch.bool: 6}


def memory(tensor: Tensor, *, elements: int | None = None, shift: int = 0) -> tuple[int, int, int]:
    count = tensor.numel() if elements is None else elements
    return tensor.data_ptr() + shift, count, TYPES[tensor.dtype]


def test_memory_of_another_size_is_an_error(native_conv: Any) -> None:
    conv, _, bits = native_conv
    dots = torch.zeros(5 * 6 * 32, dtype=torch.int32)
    conv.accumulate(1, 5, 6, memory(bits), memory(dots), 1)
    for call, said in (
        (lambda: conv.accumulate(1, 5, 7, memory(bits), memory(dots), 1), "`bits` has 60 elements"),
        (lambda: conv.accumulate(2**31, 5, 6, memory(bits), memory(dots), 1), "`batch`"),
        (lambda: conv.accumulate(1, 0, 6, memory(bits), memory(dots), 1), "`height` .=0."),
        (lambda: conv.accumulate(1, 5, -6, memory(bits), memory(dots), 1), "`width` .=-6."),
        (lambda: conv.accumulate(1, 5, 6, (0, 60, 5), memory(dots), 1), "aligned memory"),
        (lambda: conv.accumulate(1, 5, 6, memory(bits, shift=1), memory(dots), 1), "aligned"),
        (
            lambda: conv.accumulate(1, 5, 6, memory(bits), memory(dots, elements=959), 1),
            "`dots` has 959 elements, but 960 are wanted",
        ),
        (lambda: conv.accumulate(1, 5, 6, memory(bits), memory(dots), 0), "`threads` .=0."),
        (lambda: conv.run(1, 5, 6, memory(bits), *[None] * 4, (0, 0), 1), "without an epilogue"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_memory_of_another_type_is_an_error(native_conv: Any) -> None:
    conv, _, bits = native_conv
    dots = torch.zeros(5 * 6 * 32, dtype=torch.int32)
    with pytest.raises(ValueError, match="`bits` has memory of type 6, but of type 5 is wanted"):
        conv.accumulate(1, 5, 6, (*memory(bits)[:2], 6), memory(dots), 1)
    with pytest.raises(ValueError, match="`dots` has memory of type 1"):
        conv.accumulate(1, 5, 6, memory(bits), memory(dots.float()), 1)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.float16),
        torch.zeros(4, dtype=torch.uint8),
        torch.zeros(1).expand(4),
        torch.zeros(4, 4)[:, :2],
        torch.zeros(4, device="meta"),
    ],
)
def test_a_native_step_takes_no_tensor_with_gaps_or_of_another_dtype(tensor: Tensor) -> None:
    with pytest.raises(ValueError, match="A native step takes CPU tensors of float32, int32"):
        native_memory(tensor)


def test_sizes_that_overflow_are_errors(native_conv: Any) -> None:
    conv, _, bits = native_conv
    huge = 2**31 - 1
    with pytest.raises(ValueError, match="too large for this machine"):
        conv.accumulate(huge, huge, huge, memory(bits), memory(bits), 1)


def test_weights_that_are_not_prepacked_are_refused(native_conv: Any) -> None:
    from biper_engine import _cpu

    _, prepacked, _ = native_conv
    for position in (0, 1, 2, 5):
        wrong = prepacked.clone()
        wrong[position] ^= 1
        with pytest.raises(ValueError, match="made for another convolution"):
            _cpu.Conv(GEOMETRY, memory(wrong))
    with pytest.raises(ValueError, match="`prepacked` has 3 elements"):
        _cpu.Conv(GEOMETRY, memory(prepacked[:3]))


def test_a_kernel_that_does_not_fit_is_an_error() -> None:
    from biper_engine import _cpu

    values = changed(top=0, bottom=0, left=0, right=0)
    prepacked = torch.zeros(_cpu.prepacked_words(values), dtype=torch.int32)
    _cpu.prepack(values, memory(torch.zeros(576, dtype=torch.int32)), memory(prepacked))
    conv = _cpu.Conv(values, memory(prepacked))
    bits = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="reach 3 does not fit into an axis of size 2"):
        conv.accumulate(1, 2, 1, memory(bits), memory(bits), 1)


def test_maps_and_pools_are_checked() -> None:
    from biper_engine import _cpu

    words = torch.zeros(12, dtype=torch.int32)
    floats = torch.zeros(4, 33)
    for call, said in (
        (
            lambda: _cpu.binarize(4, 33, (*memory(floats)[:2], 7), None, None, memory(words), 1),
            "`type`",
        ),
        (
            lambda: _cpu.binarize(4, 0, (*memory(floats)[:2], 1), None, None, memory(words), 1),
            "chann",
        ),
        (
            lambda: _cpu.binarize(5, 33, (*memory(floats)[:2], 1), None, None, memory(words), 1),
            "`x`",
        ),
        (
            lambda: _cpu.binarize(
                4,
                33,
                (*memory(floats)[:2], 1),
                memory(floats, elements=32),
                None,
                memory(words[:8]),
                1,
            ),
            "`threshold` has 32",
        ),
        (
            lambda: _cpu.unbinarize(4, 33, memory(words), (*memory(floats)[:2], 1), 1),
            "`bits` has 12",
        ),
        (
            lambda: _cpu.maxpool(
                1, 3, 4, 9, (2, 2, 1, 1, 2, 0), memory(words), None, memory(words), 1
            ),
            "pool_padding",
        ),
        (
            lambda: _cpu.maxpool(
                1, 3, 4, 9, (4, 1, 1, 1, 0, 0), memory(words), None, memory(words), 1
            ),
            "does not fit",
        ),
        (
            lambda: _cpu.maxpool(
                1, 3, 4, 9, (1, 1, 0, 1, 0, 0), memory(words), None, memory(words), 1
            ),
            "pool_stride",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize(
    ("step", "changes", "message"),
    [
        ("sum", {"a": None}, "`a` is missing"),
        ("sum", {"a": 7}, r"`map` \(=7\) must be from 0 to 0"),
        ("sum", {"a": True}, "`a` must be an integer"),
        ("sum", {"clamp_min": True}, "`clamp_min` must be a number"),
        ("sum", {"gate": 1}, "`gate` is no argument of this step"),
        ("binarize", {"threshold": torch.zeros(5).bool()}, "`threshold` has memory of type 6"),
        ("binarize", {"threshold": torch.zeros(4)}, "`threshold` has 4 elements, but 5 are wanted"),
        ("binarize", {"threshold": torch.zeros(5).double()}, "float32, int32 or bool"),
        ("maximum", {"pool": (1, 1)}, "`pool` has 2 integers, but 6 are wanted"),
        ("difference", {}, "There is no step 'difference'"),
    ],
)
def test_a_step_refuses_arguments_that_are_not_its_own(
    step: str, changes: dict[str, Any], message: str
) -> None:
    program = CpuProgram()
    x = program.add_map(5, 4, 4)
    fits: dict[str, Any] = {"a": x} if step == "sum" else {"x": x}
    with pytest.raises(ValueError, match=message):
        program.add(step, **{**fits, **changes})
    program.finish([x], program.add("sum", a=x))  # nothing was added
    assert torch.equal(program(torch.ones(1, 5, 4, 4))[0], torch.ones(1, 5, 4, 4))


def test_a_limit_may_be_an_integer() -> None:
    program = CpuProgram()
    x = program.add_map(5, 4, 4)
    program.finish([x], program.add("sum", a=x, clamp_min=2, clamp_max=6))
    assert torch.equal(program(torch.ones(1, 5, 4, 4))[0], torch.full((1, 5, 4, 4), 2.0))
