"""Bytes, multiply-accumulates and floors, beside figures worked out by hand."""

import gpu_layers
import pytest
import torch
from gpu_ceilings import PEAKS, lines, peaks
from gpu_roofline import Ceilings, Conv, Work, share, total
from gpu_traffic import kernels
from torch import nn

from biper_engine import convert
from biper_engine.bench import RESNET18_LAYERS
from biper_engine.geometry import Conv2dGeometry
from biper_engine.nn import BinaryConv2d

CEILINGS = Ceilings(
    copy_bytes=1e12, l2_copy_bytes=4e12, l2_bytes=1000, binary_macs=1e15, popcount_macs=1e13,
    int8_macs=1e14, float_macs=2e14, launches=5e5,
)  # fmt: skip


def test_the_longest_of_three_times_is_the_floor() -> None:
    work = Work(nbytes=2e6, bit_macs=1e9, float_macs=1e9)
    assert work.times(CEILINGS) == pytest.approx({"bytes": 2e-6, "bits": 1e-6, "floats": 5e-6})
    assert work.floor(CEILINGS) == (pytest.approx(5e-6), "floats")
    assert Work(nbytes=2e6, bit_macs=1e9).floor(CEILINGS) == (pytest.approx(2e-6), "bytes")
    assert Work(nbytes=1e6, bit_macs=3e9).floor(CEILINGS) == (pytest.approx(3e-6), "bits")


def test_bits_in_groups_are_bound_by_popcounts_and_others_by_the_best_unit() -> None:
    work = Work(bit_macs=1e9, grouped_bit_macs=1e8)
    assert work.times(CEILINGS)["bits"] == pytest.approx(1e-6 + 1e-5)
    without = Ceilings(copy_bytes=1e12, int8_macs=1e14, popcount_macs=1e13)
    assert Work(bit_macs=1e9).times(without)["bits"] == pytest.approx(1e-5)


def test_what_l2_holds_is_bound_by_l2() -> None:
    assert Work(nbytes=500).times(CEILINGS)["bytes"] == pytest.approx(500 / 4e12)
    assert Work(nbytes=501).times(CEILINGS)["bytes"] == pytest.approx(501 / 1e12)


def test_without_a_ceiling_there_is_no_floor_and_no_share() -> None:
    assert Work(nbytes=1, bit_macs=1).times(Ceilings(copy_bytes=2.0)) == {"bytes": 0.5}
    assert Work(nbytes=1).floor(Ceilings()) is None
    assert total([Work(nbytes=1), Work(float_macs=1)], Ceilings(copy_bytes=1.0)) is None
    assert share(None, 1.0) is None
    assert share(1e-6, 4e-6) == 0.25


def test_kernels_that_follow_each_other_add_up() -> None:
    works = [Work(nbytes=1e6), Work(bit_macs=1e9)]
    assert total(works, CEILINGS) == pytest.approx(2e-6)


def test_a_resnet_layer_moves_its_bits_and_its_residual_twice() -> None:
    layer = gpu_layers.RESNET[0]
    pixels = 56 * 56
    weights = 64 * 9 * 2 * 4
    for batch in (1, 256):
        work = layer.work(batch, 2)
        assert work.nbytes == batch * pixels * (8 + 8 + 2 * 64 * 2) + weights
        assert work.bit_macs == batch * pixels * 64 * 576
        assert work.grouped_bit_macs == work.float_macs == 0
    exact = layer.work(1, 4)
    assert exact.nbytes - layer.work(1, 2).nbytes == pixels * 64 * 2 * 2


def test_a_pooled_layer_of_bits_writes_a_quarter_of_the_pixels() -> None:
    work = gpu_layers.VGG[0].work(1, 2)
    assert work.nbytes == 4 * (32 * 32 * 4 + 16 * 16 * 4 + 128 * 9 * 4)
    assert work.bit_macs == 32 * 32 * 128 * 1152


def test_channels_that_fill_no_word_take_a_whole_one() -> None:
    geometry = Conv2dGeometry(in_channels=33, out_channels=5, kernel_size=(1, 1))
    conv = Conv(name="", network="", geometry=geometry, size=(2, 3))
    assert conv.work(1, 2).nbytes == 4 * (6 * 2 + 5 * 2 + 6 * 1)


def test_groups_count_as_grouped() -> None:
    grouped = gpu_layers.MOBILENET[0].work(2, 2)
    assert grouped.bit_macs == 0
    assert grouped.grouped_bit_macs == 2 * 112 * 112 * 64 * 9 * 16


def test_the_layers_are_those_of_the_networks() -> None:
    ours = {(one.geometry, one.size[0], one.count) for one in gpu_layers.RESNET}
    assert ours == {(one.geometry, one.size, one.count) for one in RESNET18_LAYERS}
    names = [f"{layer.network} {layer.name} {gpu_layers.variant(layer)} {batch}"
             for layer, batch in gpu_layers.cases()]  # fmt: skip
    assert len(set(names)) == len(names)
    assert names[0] == "ImageNet ResNet-18/34 64@56 residual+floats+bits 256"
    assert {batch for _, batch in gpu_layers.cases()} == set(gpu_layers.BATCHES)


class Small(nn.Module):
    """A stem, a binary convolution, a strided one with a 1x1 shortcut, a classifier."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Hardtanh())
        self.first = BinaryConv2d(32, 32, 3, padding=1, frequency=20.0, stage=2)
        self.conv = BinaryConv2d(32, 64, 3, 2, padding=1, frequency=20.0, stage=2)
        self.norm = nn.BatchNorm2d(64)
        self.down = nn.Conv2d(32, 64, 1, 2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = nn.functional.hardtanh(self.first(x) + x)
        y = nn.functional.hardtanh(self.norm(self.conv(x)) + self.down(x))
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


def test_the_kernels_of_a_network_are_its_binary_layers_and_what_hangs_together_between() -> None:
    torch.manual_seed(0)
    engine = convert(Small().eval(), check=False, compute_dtype=torch.float16)
    found = {kernel.name: kernel for kernel in kernels(engine, torch.randn(1, *Small.input_shape))}
    assert set(found) == {"stem.0", "first", "down", "conv", "fc"}
    assert found["stem.0"].map_bytes == 3 * 64 * 4 + 32 * 64 * 2 + 64 * 4  # floats in, both out
    assert found["stem.0"].float_macs == 64 * 32 * 27
    assert found["first"].map_bytes == 2 * (32 * 64 * 2 + 64 * 4)  # both in, both out
    # A 1x1 convolution of stride 2 needs every fourth pixel only.
    assert found["down"].map_bytes == 32 * 16 * 2 + 64 * 16 * 2
    assert found["conv"].map_bytes == 64 * 4 + 2 * (64 * 16 * 2)  # bits in, residual in, floats out
    assert found["conv"].bit_macs == 16 * 64 * 32 * 9
    assert found["conv"].float_macs == 0
    assert found["fc"].map_bytes == 64 * 16 * 2 + 10 * 4
    batch = found["fc"].work(3)
    assert batch.nbytes == found["fc"].weight_bytes + 3 * found["fc"].map_bytes
    assert batch.float_macs == 3 * 640


def test_a_peak_that_a_card_lacks_is_named_with_its_reason() -> None:
    def measure(kind: int, milliseconds: int) -> float:
        if kind == PEAKS["binary_macs"]:
            raise RuntimeError("no 1-bit matrix instructions")
        return 1e12 * (kind + milliseconds)

    rates, reasons = peaks(measure)
    assert set(rates) == set(PEAKS) - {"binary_macs"}
    assert reasons == {"binary_macs": "no 1-bit matrix instructions"}
    told = lines({**rates, "launches": 5e5, "not_measured": reasons})
    assert "launch gap in a CUDA graph: 2.00 us" in told
    assert "binary_macs: not measured, no 1-bit matrix instructions" in told
