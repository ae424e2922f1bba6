from typing import Any

import pytest
import torch

from biper_engine.bench import RESNET18_LAYERS, ConvShape, LayerWork, network_work
from biper_engine.ops import use_backend
from biper_engine.ops.backends import backends
from biper_engine.ops.cpu_program import CpuProgram
from biper_engine.ops.reference import ReferenceBackend

CPU = {info.name: info.available for info in backends()}["cpu"]
SMALL = ConvShape(in_channels=33, out_channels=40, size=6, stride=2, count=2)


def test_the_layers_are_those_of_resnet18() -> None:
    assert sum(shape.count for shape in RESNET18_LAYERS) == 16
    # The strided layers have half the work of the others, 115.6 million.
    assert sum(shape.count * shape.macs for shape in RESNET18_LAYERS) == 1_676_279_808
    assert [shape.name for shape in RESNET18_LAYERS][:2] == ["64@56", "64>128@56/2"]


def test_both_forms_of_a_layer_have_the_same_shape() -> None:
    work = LayerWork(SMALL, batch=3)
    floats, bits = work.engine_call()
    assert floats is not None
    assert bits is not None
    assert floats.shape == work.float_call().shape == (3, 40, 3, 3)
    assert bits.shape == (3, 3, 3, 2)


def test_a_backend_with_wrong_accumulators_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ReferenceBackend.bconv2d

    def wrong(self: ReferenceBackend, *arguments: object) -> torch.Tensor:
        return original(self, *arguments) + 1  # type: ignore[arg-type]

    monkeypatch.setattr(ReferenceBackend, "bconv2d", wrong)
    with use_backend("reference"), pytest.raises(ValueError, match="accumulators of 33>40@6/2"):
        LayerWork(SMALL)


def test_a_network_runs_each_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("float_call", "engine_call"):
        monkeypatch.setattr(LayerWork, name, lambda self, name=name: ran.append(name))
    monkeypatch.setattr(LayerWork, "__init__", lambda self, shape, batch: None)
    in_float, on_bits = network_work([SMALL])
    in_float()
    on_bits()
    assert ran == ["float_call"] * 2 + ["engine_call"] * 2


@pytest.mark.skipif(not CPU, reason="no cpu backend here")
@pytest.mark.parametrize("fused", [False, True])
def test_the_kernel_alone_computes_what_the_layer_does(
    monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    work = LayerWork(SMALL, batch=3)
    original, seen = CpuProgram.timed, list[tuple[torch.Tensor, ...]]()

    def watched(self: CpuProgram, *inputs: torch.Tensor) -> Any:
        outputs, seconds = original(self, *inputs)
        seen.append(outputs)
        return outputs, seconds

    monkeypatch.setattr(CpuProgram, "timed", watched)
    assert work.kernel_call(fused=fused)() > 0.0
    if fused:
        assert all(map(torch.equal, seen[0], work.engine_call()))
    else:
        assert [tuple(out.shape) for out in seen[0]] == [(3, 3, 3, 2)]


def test_the_kernel_alone_is_the_cpu_backends() -> None:
    with use_backend("reference"), pytest.raises(ValueError, match="runs on reference"):
        LayerWork(SMALL).kernel_call(fused=True)
