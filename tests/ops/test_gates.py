"""The gate of the epilogue: a factor for each image and channel, before the residual."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine.errors import GeometryError
from biper_engine.geometry import Conv2dGeometry
from biper_engine.ops import (
    Epilogue,
    bconv2d_bits,
    bconv2d_float,
    bconv2d_float_bits,
    use_backend,
)
from biper_engine.ops.backends import _REGISTERED, refusal
from tests.ops.matrix import (
    CONVOLUTIONS,
    EPILOGUE_CONV,
    EPILOGUE_POOLS,
    EPILOGUE_SIZE,
    STREAMS,
    Operands,
    epilogue_of,
    geometry,
    residual_of,
    vector,
    with_met_thresholds,
)
from tests.ops.test_epilogue import check_all_outputs, expected_values, need_all

BATCH = 3
SHAPES = {
    "images and channels": (BATCH, None, 1, 1),
    "images": (BATCH, 1, 1, 1),
    "channels": (1, None, 1, 1),
    "one": (1, 1, 1, 1),
    "a matrix": (BATCH, None),
}


def gate_of(shape: tuple[int | None, ...], channels: int) -> Tensor:
    """Return a gate with signed zeros, negative numbers, and numbers that underflow."""
    sizes = [channels if size is None else size for size in shape]
    values = torch.randn(sizes, generator=torch.Generator().manual_seed(8))
    special = torch.tensor([1.0, -0.5, 0.0, -0.0, 1.0, -2.0, 3e36, -1e-38, 1e-44])
    flat = values.flatten()
    flat[: special.numel()] = special[: flat.numel()]
    return flat.view(sizes)


CASES = {
    "plain": ("images and channels", False, "no pool", "linear", None),
    "offset": ("images and channels", True, "no pool", "linear", "float32"),
    "pool": ("images and channels", True, "3x3 padded", "prelu", "float32"),
    "pool, one for an image": ("images", False, "2x2", "two slopes", "float16"),
    "one for an image": ("images", True, "no pool", "hardtanh", None),
    "one for a channel": ("channels", True, "no pool", "prelu", "bfloat16"),
    "one": ("one", False, "no pool", "relu", "float32"),
    "a matrix": ("a matrix", True, "no pool", "clamped above", "float32"),
}


@pytest.mark.some(11)
@pytest.mark.parametrize("name", CASES)
def test_a_gate_multiplies_in_its_place(
    device: torch.device,
    need: Callable[..., None],
    exact_fma: Callable[..., float],
    same_bytes: Callable[..., bool],
    name: str,
) -> None:
    form, has_offset, pool, activation, stream = CASES[name]
    conv, size = EPILOGUE_CONV, EPILOGUE_SIZE
    channels, data = conv.out_channels, Operands(conv, size, BATCH)
    epilogue = epilogue_of(channels, pool, activation)
    if has_offset:
        epilogue = dataclasses.replace(epilogue, offset=vector(channels, 0.0, -0.0, 0.5, seed=9))
    need_all(need, conv, epilogue, "gate")
    gate = gate_of(SHAPES[form], channels)
    rows, columns = EPILOGUE_POOLS[pool].output_size(*conv.output_size(*size))
    residual = residual_of(stream, BATCH, channels, rows, columns)
    values = expected_values(data.dot, epilogue, residual, exact_fma, gate)
    whole = with_met_thresholds(epilogue, torch.from_numpy(values))
    check_all_outputs(data, conv, whole, residual, values, device, same_bytes, gate)


@pytest.mark.some(10)
@pytest.mark.parametrize(
    "name", ["1x1", "127 channels", "65 filters", "three groups of 40", "everything", "depthwise"]
)
def test_every_geometry_has_gates(
    device: torch.device,
    need: Callable[..., None],
    exact_fma: Callable[..., float],
    same_bytes: Callable[..., bool],
    name: str,
) -> None:
    conv, size = CONVOLUTIONS[name]
    data, channels = Operands(conv, size, BATCH), conv.out_channels
    epilogue = epilogue_of(channels, "no pool", "prelu")
    epilogue = dataclasses.replace(epilogue, offset=vector(channels, seed=9))
    need_all(need, conv, epilogue, "gate")
    residual = residual_of("float32", *data.dot.shape)
    gate = gate_of(SHAPES["images and channels"], channels)
    values = expected_values(data.dot, epilogue, residual, exact_fma, gate)
    whole = with_met_thresholds(epilogue, torch.from_numpy(values))
    check_all_outputs(data, conv, whole, residual, values, device, same_bytes, gate)


LINEAR = geometry(in_channels=70, out_channels=67, kernel_size=(1, 1))


def with_bits(channels: int, **more: Any) -> Epilogue:
    base = dataclasses.replace(epilogue_of(channels, "no pool", "linear"), **more)
    return dataclasses.replace(
        base, threshold=torch.zeros(channels), sense=torch.arange(channels) % 2 == 0
    )


@pytest.mark.some(14)
@pytest.mark.parametrize("batch", [0, 1, 2, 5, 70])
@pytest.mark.parametrize("threads", [1, 3])
def test_images_of_a_linear_layer_keep_their_own_gates(
    device: torch.device,
    need: Callable[..., None],
    same_bytes: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    threads: int,
) -> None:
    """Pixels of several images share a tile there; each image alone gives the same bytes."""
    need_all(need, LINEAR, None, "gate")
    monkeypatch.setenv("BIPER_NUM_THREADS", str(threads))
    data = Operands(LINEAR, (1, 1), batch)
    bits, weight = data.bits.to(device), data.weight.to(device)
    epilogue = with_bits(67, shift=None)
    epilogue = dataclasses.replace(
        epilogue, **{name: x.to(device) for name, x in epilogue.tensors().items()}
    )
    gate = torch.randn(batch, 67, generator=torch.Generator().manual_seed(1)).to(device)
    floats, packed = bconv2d_float_bits(bits, weight, LINEAR, epilogue, gate=gate)
    wanted = bconv2d_float(bits, weight, LINEAR, epilogue) * gate[:, :, None, None]
    assert same_bytes(floats, wanted)
    for n in range(batch):
        one = slice(n, n + 1)
        alone = bconv2d_float_bits(bits[one], weight, LINEAR, epilogue, gate=gate[one])
        assert same_bytes(floats[one], alone[0])
        assert torch.equal(packed[one], alone[1])


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_gates_that_are_no_numbers_give_what_multiplication_gives(
    device: torch.device, need: Callable[..., None], number: float
) -> None:
    conv = geometry(out_channels=37)
    data = Operands(conv, (4, 4), 2)
    epilogue = with_bits(37, offset=torch.ones(37), clamp_min=-3.0)
    need_all(need, conv, epilogue, "gate")
    moved: Any = {name: x.to(device) for name, x in epilogue.tensors().items()}
    operands = data.bits.to(device), data.weight.to(device), conv
    epilogue = dataclasses.replace(epilogue, **moved)
    gate = torch.full((2, 37), 0.5, device=device)
    gate[1, ::2] = number
    plain = Epilogue(multiplier=epilogue.multiplier, bias=epilogue.bias)
    v = bconv2d_float(*operands, plain) * gate[:, :, None, None] + 1.0
    wanted = torch.where(v < -3.0, -3.0, v) + moved["shift"].view(1, -1, 1, 1)
    floats, packed = bconv2d_float_bits(*operands, epilogue, gate=gate)
    torch.testing.assert_close(floats, wanted, equal_nan=True)
    assert torch.equal(floats.isnan(), wanted.isnan())
    again = bconv2d_bits(*operands, epilogue, gate=gate)
    assert torch.equal(packed, again)
    with use_backend("reference"):
        cpu = dataclasses.replace(epilogue, **{n: x.cpu() for n, x in moved.items()})
        same = bconv2d_bits(data.bits, data.weight, conv, cpu, gate=gate.cpu())
    assert torch.equal(packed.cpu(), same)


@pytest.mark.parametrize("dtype", list(STREAMS.values()))
def test_a_gate_may_have_the_dtype_and_the_strides_of_any_stream(
    device: torch.device,
    need: Callable[..., None],
    same_bytes: Callable[..., bool],
    dtype: torch.dtype,
) -> None:
    conv = geometry(out_channels=6)
    data = Operands(conv, (4, 4), 2)
    epilogue = with_bits(6)
    need_all(need, conv, epilogue, "gate")
    epilogue = dataclasses.replace(
        epilogue, **{name: x.to(device) for name, x in epilogue.tensors().items()}
    )
    operands = data.bits.to(device), data.weight.to(device), conv, epilogue
    gate = gate_of((6, 2), 6).to(device, dtype).t()
    got = bconv2d_float(*operands, gate=gate)
    assert same_bytes(got, bconv2d_float(*operands, gate=gate.float().contiguous()))


@pytest.mark.parametrize(
    "shape", [(2, 5), (3, 6), (2, 6, 4, 4), (2, 6, 1), (6,), (2,), (), (0, 6), (2, 6, 1, 1, 1)]
)
def test_a_gate_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    conv = geometry(out_channels=6)
    data = Operands(conv, (4, 4), 2)
    with pytest.raises(GeometryError, match=r"`gate` must be \[2 or 1, 6 or 1\]"):
        bconv2d_float(data.bits, data.weight, conv, with_bits(6), gate=torch.ones(shape))


def test_a_gate_is_a_float_and_an_offset_needs_one() -> None:
    conv = geometry(out_channels=6)
    operands = Operands(conv, (4, 4), 2)
    data = operands.bits, operands.weight, conv
    with pytest.raises(TypeError, match=r"`gate.dtype` \(=torch.int32\)"):
        bconv2d_float(*data, with_bits(6), gate=torch.ones(2, 6, dtype=torch.int32))
    with pytest.raises(ValueError, match="`offset` is added after a gate, but there is no `gate`"):
        bconv2d_float(*data, with_bits(6, offset=torch.ones(6)))


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backends_without_gates_say_so(name: str) -> None:
    conv = Conv2dGeometry(in_channels=3, out_channels=4, kernel_size=(1, 1))
    reason = refusal(
        _REGISTERED[name], "bconv2d_float", conv, torch.device("cuda"), frozenset({"gate"})
    )
    assert reason == "its epilogue has no gate yet"
