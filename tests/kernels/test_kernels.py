"""Cases outside the operator matrix: tiles and offsets of maps too large for a test.

Runs in Triton's interpreter; `tests/ops/test_triton.py` starts it.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from biper_engine import ops
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops.backends import use_backend
from tests.ops.matrix import CONVOLUTIONS, EPILOGUE_CONV, EPILOGUE_SIZE, Operands, epilogue_of
from tests.shared import triton_is_interpreted

pytestmark = pytest.mark.skipif(
    not triton_is_interpreted(), reason="these tests need triton and TRITON_INTERPRET=1"
)
UNGROUPED = [name for name, (conv, _) in CONVOLUTIONS.items() if conv.groups == 1]


@pytest.fixture(autouse=True)
def _forced() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.fixture
def configs() -> ModuleType:
    from biper_engine.kernels import configs

    return configs


@pytest.fixture
def wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    from biper_engine.kernels import launch

    monkeypatch.setattr(launch, "_OFFSET_LIMIT", -(1 << 40))
    monkeypatch.setattr(launch, "check_area", lambda *sizes: None)


def with_threshold(pool: str) -> ops.Epilogue:
    channels = EPILOGUE_CONV.out_channels
    named: dict[str, Any] = vars(epilogue_of(channels, pool, "hardtanh"))
    sense = torch.arange(channels) % 2 == 0
    return ops.Epilogue(**{**named, "threshold": torch.zeros(channels), "sense": sense})


def check_against_reference(conv: Conv2dGeometry, size: tuple[int, int], pool: str) -> None:
    data, epilogue = Operands(conv, size, 3), with_threshold(pool)
    floats, bits = ops.bconv2d_float_bits(data.bits, data.weight, conv, epilogue)
    with use_backend("reference"):
        expected = ops.bconv2d_float_bits(data.bits, data.weight, conv, epilogue)
    assert torch.equal(floats, expected[0])
    assert torch.equal(bits, expected[1])


@pytest.mark.parametrize("pool", ["no pool", "2x2"])
def test_the_tiles_of_a_gpu_give_the_bytes_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, configs: ModuleType, pool: str
) -> None:
    chosen = configs.dot_tile
    monkeypatch.setattr(configs, "dot_tile", lambda capability, **named: chosen(90, **named))
    check_against_reference(EPILOGUE_CONV, EPILOGUE_SIZE, pool)


@pytest.mark.deep
@pytest.mark.usefixtures("wide_offsets")
def test_64_bit_offsets_give_the_bytes_of_the_reference() -> None:
    check_against_reference(EPILOGUE_CONV, EPILOGUE_SIZE, "2x2")
    conv, size = CONVOLUTIONS["everything"]
    data = Operands(conv, size, 2)
    assert torch.equal(ops.bconv2d(data.bits, data.weight, conv), data.dot)
    x = torch.randn(3, 33, 4, 5)
    bits, pool = ops.binarize(x), Pool2dGeometry(kernel_size=(2, 2))
    pooled = ops.bmaxpool2d(bits, 33, pool)
    with use_backend("reference"):
        assert torch.equal(ops.binarize(x), bits)
        assert torch.equal(ops.bmaxpool2d(bits, 33, pool), pooled)


@pytest.mark.deep
@pytest.mark.parametrize("name", UNGROUPED)
def test_population_counts_give_the_accumulators(
    monkeypatch: pytest.MonkeyPatch, configs: ModuleType, name: str
) -> None:
    monkeypatch.setattr(configs, "MAX_POPCOUNT_FILTERS", 1 << 30)
    conv, size = CONVOLUTIONS[name]
    data = Operands(conv, size, 2)
    assert torch.equal(ops.bconv2d(data.bits, data.weight, conv), data.dot)


@pytest.mark.deep
@pytest.mark.parametrize("pool", ["no pool", "3x3 padded"])
def test_population_counts_go_through_the_same_epilogue(
    monkeypatch: pytest.MonkeyPatch, configs: ModuleType, pool: str
) -> None:
    monkeypatch.setattr(configs, "MAX_POPCOUNT_FILTERS", 1 << 30)
    check_against_reference(EPILOGUE_CONV, EPILOGUE_SIZE, pool)


@pytest.mark.parametrize("tile", [0, 1, (1 << 31) // 32 + 5, (1 << 40) + 3])
def test_pixels_are_counted_in_64_bits(tile: int) -> None:
    from tests.kernels.places import places_kernel

    rows, height, width = 32, 3, 7
    places, valid = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int32)
    places_kernel[(1,)](places, valid, tile, tile * rows + 30, height, width, ROWS=rows)
    assert torch.equal(places, tile * rows + torch.arange(rows))
    assert valid.tolist() == [1] * 30 + [0, 0]
