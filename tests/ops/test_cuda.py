"""The CUDA backend's own kernels for a convolution, on the emulator or on a GPU."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine import bits as contract
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops import Epilogue
from biper_engine.ops.backends import backends, by_name
from biper_engine.ops.cuda import CudaBackend, _Conv
from biper_engine.ops.cuda_layout import bit_limits
from biper_engine.ops.reference import ReferenceBackend, apply_epilogue
from tests.ops.matrix import Operands, residual_of, vector

BITS, BYTES, POPCOUNT = 1, 2, 3
PATHS = {"bits": BITS, "bytes": BYTES}
POOL = Pool2dGeometry(kernel_size=(2, 2), stride=(2, 2))


@pytest.fixture(
    params=[pytest.param("emulated", marks=pytest.mark.deep), *["gpu"] * torch.cuda.is_available()]
)
def cuda(request: pytest.FixtureRequest) -> Iterator[tuple[CudaBackend, torch.device]]:
    """Give the backend and a device that it runs on."""
    if request.param == "emulated":
        yield request.getfixturevalue("emulated_cuda"), torch.device("cpu")
        return
    reason = next(info.reason for info in backends() if info.name == "cuda")
    if reason is not None:
        pytest.skip(f"cuda: {reason}")
    backend: Any = by_name("cuda")
    yield backend, torch.device("cuda")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A convolution that must run in a certain way.

    Attributes:
        processors: that the tile is chosen for.
        shared_bytes: of a block of the emulated device.
        expected: fields of ConvWay.
    """

    channels: int
    filters: int
    size: tuple[int, int]
    batch: int = 1
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    pool: Pool2dGeometry = field(default_factory=Pool2dGeometry)
    processors: int = 1
    shared_bytes: int = 227 * 1024
    expected: dict[str, Any] = field(default_factory=dict)

    @property
    def geometry(self) -> Conv2dGeometry:
        return Conv2dGeometry(
            in_channels=self.channels,
            out_channels=self.filters,
            kernel_size=(self.kernel_size, self.kernel_size),
            stride=(self.stride, self.stride),
            padding=(self.padding,) * 4,
        )


CASES = {
    "ResNet, 64 channels": Case(
        channels=64, filters=64, size=(15, 18), expected={"rows": 128, "columns": 64}
    ),
    "ResNet, 64 to 128 channels, strided": Case(
        channels=64, filters=128, size=(16, 24), stride=2, expected={"rows": 128}
    ),
    "ResNet, 512 channels, several images in a tile": Case(
        channels=512, filters=64, size=(7, 7), batch=5, expected={"rows": 128}
    ),
    "few rows": Case(
        channels=128, filters=128, size=(7, 7), batch=2, processors=2, expected={"rows": 64}
    ),
    "fewer still": Case(
        channels=128, filters=128, size=(7, 7), processors=4, expected={"rows": 32, "columns": 32}
    ),
    "VGG, pooled": Case(channels=128, filters=64, size=(16, 18), pool=POOL, expected={"rows": 128}),
    "pooled, odd map, images in a tile": Case(
        channels=64, filters=32, size=(7, 9), batch=3, pool=POOL, expected={"rows": 128}
    ),
    "channels in chunks": Case(
        channels=1056, filters=64, size=(5, 6), batch=5, expected={"chunks": 3, "rows": 128}
    ),
    "binary matrix product": Case(
        channels=4128,
        filters=96,
        size=(1, 1),
        batch=70,
        kernel_size=1,
        padding=0,
        processors=2,
        expected={"chunks": 3, "rows": 64},
    ),
    "tiles narrower than a row": Case(
        channels=64,
        filters=64,
        size=(3, 400),
        shared_bytes=24 * 1024,
        expected={"width": 64, "rows": 128},
    ),
    "odd words, unused bits": Case(
        channels=150, filters=64, size=(9, 16), expected={"rows": 128, "ragged": False}
    ),
    "channels not in eights": Case(
        channels=64, filters=44, size=(12, 12), expected={"rows": 32, "ragged": True}
    ),
    "a window of 5 and its 25 kinds of border": Case(
        channels=32, filters=32, size=(12, 13), kernel_size=5, padding=2, expected={"rows": 128}
    ),
}


def epilogue_of(channels: int, pool: Pool2dGeometry, **options: Any) -> Epilogue:
    pool_min = None if pool.is_identity else torch.arange(channels) % 3 == 0
    return Epilogue(
        multiplier=vector(channels, 0.0, -0.02, seed=1, scale=0.02),
        bias=vector(channels, 0.0, seed=2, scale=0.3),
        threshold=vector(channels, 0.0, -0.0, seed=6, scale=0.1),
        sense=torch.arange(channels) % 2 == 1,
        pool=pool,
        pool_min=pool_min,
        **options,
    )


def to(epilogue: Epilogue, device: torch.device) -> Epilogue:
    tensors: dict[str, Any] = {n: t.to(device) for n, t in epilogue.tensors().items()}
    return dataclasses.replace(epilogue, **tensors)


@dataclass(frozen=True)
class Fused:
    """What a convolution runs with, on the backend and in the reference."""

    data: Operands
    geometry: Conv2dGeometry
    epilogue: Epilogue
    residual: Tensor | None
    dtype: torch.dtype | None
    bits: bool

    def expected(self) -> tuple[Tensor | None, Tensor | None]:
        v = apply_epilogue(self.data.dot, self.epilogue, self.residual)
        floats = None if self.dtype is None else v.to(self.dtype)
        reference = ReferenceBackend()
        limits = (self.epilogue.threshold, self.epilogue.sense)
        return floats, reference.binarize(v, *limits) if self.bits else None

    def run(
        self, backend: CudaBackend, device: torch.device, path: int, processors: int
    ) -> tuple[Any, tuple[Tensor | None, Tensor | None]]:
        """Return the way that the call took, and its results."""
        epilogue = to(self.epilogue, device)
        prepacked = backend.prepack(self.data.weight.to(device), self.geometry)
        limits = None
        if self.dtype is None and self.residual is None:
            limits = bit_limits(epilogue, self.geometry.reduction)
        conv = _Conv(backend._native, self.geometry, prepacked, epilogue, limits, path, processors)
        residual = self.residual
        if residual is not None:
            residual = residual.to(device).contiguous(memory_format=torch.channels_last)
        operands = (self.data.bits.to(device), residual, self.dtype, self.bits)
        return conv.way(*operands), conv.fused(*operands)


LEAVING: dict[str, dict[str, Any]] = {
    "bits alone": {"bits": True},
    "float32 and bits": {"dtype": torch.float32, "bits": True},
    "float16 and bits, float16 residual": {
        "dtype": torch.float16,
        "bits": True,
        "residual": "float16",
        "clamp_min": -1.0,
        "clamp_max": 1.0,
    },
    "bfloat16, clamped at zero": {"dtype": torch.bfloat16, "clamp_min": 0.0},
    "bits after a float16 residual": {"bits": True, "residual": "float16"},
    "two types": {"dtype": torch.float32, "residual": "float16", "slope": True, "shift": True},
}


def fused(case: Case, leaving: dict[str, Any]) -> Fused:
    options = dict(leaving)
    dtype, bits = options.pop("dtype", None), options.pop("bits", False)
    stream = options.pop("residual", None)
    if options.get("slope"):
        options["slope"] = vector(case.filters, 0.25, -0.5, seed=3)
    if options.get("shift"):
        options["shift"] = vector(case.filters, 0.0, seed=4)
    data = Operands(case.geometry, case.size, case.batch)
    size = case.pool.output_size(*case.geometry.output_size(*case.size))
    residual = residual_of(stream, case.batch, case.filters, *size)
    epilogue = epilogue_of(case.filters, case.pool, **options)
    return Fused(data, case.geometry, epilogue, residual, dtype, bits)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_tile_gives_the_bytes_of_the_reference(
    cuda: tuple[CudaBackend, torch.device],
    monkeypatch: pytest.MonkeyPatch,
    same_bytes: Callable[..., bool],
    case: Case,
    path: int,
) -> None:
    backend, device = cuda
    monkeypatch.setenv("BIPER_EMULATED_SHARED_BYTES", str(case.shared_bytes))
    properties = backend._native.module.device_properties()
    if not (properties.has_binary_mma if path == BITS else properties.has_byte_mma):
        pytest.skip("the device has no such products")
    for name, leaving in LEAVING.items():
        call = fused(case, leaving)
        way, (floats, packed) = call.run(backend, device, path, case.processors)
        wanted = {"path": path, **case.expected}
        if name == "two types":
            wanted = {"path": path, "ragged": True, "rows": 32, "columns": 32}
        if device.type == "cpu" or case.shared_bytes == 227 * 1024:
            assert {key: getattr(way, key) for key in wanted} == wanted, name
        expected_floats, expected_bits = call.expected()
        if expected_floats is not None:
            assert floats is not None
            assert same_bytes(floats, expected_floats), name
        if expected_bits is not None:
            assert packed is not None
            assert torch.equal(packed.cpu(), expected_bits), name


def test_a_misaligned_map_takes_the_ragged_way(
    cuda: tuple[CudaBackend, torch.device], same_bytes: Callable[..., bool]
) -> None:
    backend, device = cuda
    case = Case(channels=64, filters=64, size=(6, 6))
    call = fused(case, {"dtype": torch.float32})
    shifted = torch.zeros(call.data.bits.numel() + 1, dtype=torch.int32, device=device)[1:]
    shifted.copy_(call.data.bits.flatten())
    bits = shifted.view(call.data.bits.shape)
    assert bits.data_ptr() % 8 == 4
    residual = torch.zeros(case.filters * 36 + 1, device=device)[1:].view(1, 6, 6, case.filters)
    prepacked = backend.prepack(call.data.weight.to(device), call.geometry)
    conv = _Conv(backend._native, call.geometry, prepacked, to(call.epilogue, device))
    operands = (bits, residual.permute(0, 3, 1, 2), torch.float32, False)
    assert conv.way(*operands).ragged
    floats, _ = conv.fused(*operands)
    expected, _ = call.expected()
    assert expected is not None
    assert same_bytes(floats, expected + 0.0)


def test_limits_hold_for_every_accumulator() -> None:
    reduction, channels = 45, 64
    generator = torch.Generator().manual_seed(0)
    for options in (
        {},
        {"clamp_min": -1.0, "clamp_max": 1.0},
        {"slope": torch.rand(channels, generator=generator)},
        {"shift": torch.randn(channels, generator=generator)},
    ):
        epilogue = epilogue_of(channels, Pool2dGeometry(), **options)
        limits = bit_limits(epilogue, reduction)
        assert limits is not None
        first, span = limits
        kinds = set()
        for dot in range(-reduction, reduction + 1):
            v = apply_epilogue(
                torch.full((1, channels, 1, 1), dot, dtype=torch.int32), epilogue, None
            )
            bits = contract.binarize(v.flatten(), epilogue.threshold, epilogue.sense)
            inside = (dot >= first) & (dot <= first + span)
            assert torch.equal(bits, inside)
            kinds.add(tuple(bits.tolist()))
        assert len(kinds) > 10


def test_a_negative_slope_has_no_limits() -> None:
    slope = torch.tensor([0.5, -0.5])
    epilogue = epilogue_of(2, Pool2dGeometry(), slope=slope)
    assert bit_limits(epilogue, 9) is None


def test_misaligned_weights_run_without_tensor_cores(
    cuda: tuple[CudaBackend, torch.device],
) -> None:
    backend, device = cuda
    case = Case(channels=64, filters=64, size=(6, 6))
    data = Operands(case.geometry, case.size, 1)
    prepacked = backend.prepack(data.weight.to(device), case.geometry)
    shifted = torch.cat([prepacked.new_zeros(1), prepacked])[1:]
    assert shifted.data_ptr() % 16 == 4
    dots = backend.bconv2d(data.bits.to(device), data.weight, case.geometry, shifted)
    assert torch.equal(dots.cpu(), data.dot)
