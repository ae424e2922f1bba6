from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import biper_engine
from biper_engine.bench.rivals import (
    FloatNetworks,
    Rival,
    deployed_rivals,
    openvino_float_rivals,
    rival,
    stream_rivals,
)
from biper_engine.conversion.twin import folded_network
from biper_engine.engine import Engine
from biper_engine.nn import BinaryConv2d
from tests.images import images

NAMES = [
    "PyTorch f32",
    *("OpenVINO f32", "OpenVINO bf16", "OpenVINO int8"),
    *("OpenVINO binary f32", "OpenVINO binary bf16", "ONNX Runtime f32", "ONNX Runtime int8"),
]
PACKAGES = ("onnx", "onnxruntime", "onnxscript", "openvino")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Hardtanh()),
        *(BinaryConv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Hardtanh()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    ).eval()


@pytest.fixture(scope="module", name="images")
def uneven_images() -> Tensor:
    return images(3, 3, 10, 9, seed=4)


@pytest.fixture(scope="module")
def networks(images: Tensor) -> FloatNetworks:
    return FloatNetworks.of(model(), images)


@pytest.fixture(scope="module")
def engine(images: Tensor) -> Engine:
    return biper_engine.convert(model(), images, check=False)


@pytest.fixture(scope="module")
def installed() -> None:
    absent = [name for name in PACKAGES if find_spec(name) is None]
    if absent:
        pytest.skip(f'{", ".join(absent)} not installed: pip install "biper-engine[bench]"')


@pytest.fixture(scope="module")
def found(
    installed: None, engine: Engine, networks: FloatNetworks, images: Tensor
) -> dict[str, Rival]:
    with torch.inference_mode():
        batch = images.contiguous(memory_format=torch.channels_last)
        return {one.name: one for one in deployed_rivals(engine, networks, batch, 1)}


def test_every_rival_runs_or_says_why(found: dict[str, Rival]) -> None:
    assert list(found) == NAMES
    for name, one in found.items():
        assert one.how
        assert (one.rest_ms > 0) == name.startswith("ONNX Runtime")
        if "bf16" in name and one.reason:
            assert "bfloat16" in one.reason
        else:
            assert one.reason == ""
            assert one.call is not None


def test_float32_agrees_with_its_network_on_every_image(found: dict[str, Rival]) -> None:
    agreed = {name: one.agreed for name, one in found.items() if one.agreed is not None}
    assert set(agreed) == {
        *("PyTorch f32", "ONNX Runtime f32", "OpenVINO f32", "OpenVINO binary f32"),
    }
    assert set(agreed.values()) == {(9, 9)}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_bound_computes_the_batch_it_is_bound_to(
    found: dict[str, Rival], images: Tensor, name: str
) -> None:
    one = found[name]
    if one.call is None:
        pytest.skip(one.reason)
    assert one.wanted is not None
    first, second = one.bound(images), one.bound(-images)
    for call, batch in ((first, images), (second, -images), (first, images)):
        wanted = one.wanted(batch)
        # int8: 8 bits of the largest value in each of three layers
        tolerance = 1e-5 if name.endswith("f32") else 0.1
        error = (call() - wanted).norm() / wanted.norm()
        assert error < tolerance
    assert torch.equal(one.call(images), first())


def float_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Hardswish(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Conv2d(16, 5, 1), nn.Hardsigmoid(), nn.Flatten()),
    ).eval()


def test_a_float_network_must_agree_with_pytorch(installed: None, images: Tensor) -> None:
    model = float_model()
    network = folded_network(model, images)
    with torch.inference_mode():
        full, half, small = openvino_float_rivals(network, model, images, 1)
        assert (full.name, full.agreed, full.beside) == ("OpenVINO f32", (9, 9), "PyTorch")
        torch.testing.assert_close(full.bound(images)(), model(images), rtol=1e-5, atol=1e-5)
        assert half.name == "OpenVINO bf16"
        assert (half.call is None) == ("bfloat16" in half.reason)
        assert small.name == "OpenVINO int8"
        wrong, *_ = openvino_float_rivals(network, nn.Sequential(model, nn.Tanh()), images, 1)
    assert "agrees with PyTorch on 0 of 9 images only" in wrong.reason


def test_the_quantized_file_has_int8_weights_per_channel(
    found: dict[str, Rival], networks: FloatNetworks, images: Tensor, tmp_path: Path
) -> None:
    import onnx

    from biper_engine.bench.rivals.onnx_files import export_float, quantize

    export_float(networks.twin, images, tmp_path / "float.onnx")
    quantize(tmp_path / "float.onnx", tmp_path / "int8.onnx", tuple(images.shape))
    graph = onnx.load(tmp_path / "int8.onnx").graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    weights = [
        held[n.input[0]]
        for n in graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in held
    ]
    kinds = {tensor.data_type for tensor in weights if len(tensor.dims) == 4}
    assert kinds == {onnx.TensorProto.INT8}
    scales = [n.input[1] for n in graph.node if n.op_type == "DequantizeLinear"]
    assert sum(list(held[name].dims) == [16] for name in scales) >= 2
    zeros = [n.input[2] for n in graph.node if n.op_type == "QuantizeLinear"]
    assert {held[name].data_type for name in zeros} == {onnx.TensorProto.UINT8}


def test_without_the_packages_each_says_what_to_install(
    engine: Engine, networks: FloatNetworks, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rival, "find_spec", lambda _: None)
    rivals = deployed_rivals(engine, networks, images, 1)
    assert [one.name for one in rivals] == NAMES
    assert rivals[0].call is not None
    others = rivals[1:]
    assert all(one.call is None for one in others)
    assert all('pip install "biper-engine[bench]"' in one.reason for one in others)
    assert others[0].reason.startswith("onnx and onnxscript and openvino not installed")


def ways(names: dict[str, list[Rival]]) -> dict[str, list[str]]:
    return {program: [one.name for one in rivals] for program, rivals in names.items()}


def test_streams_are_one_a_half_all_and_twice_the_threads(
    engine: Engine, networks: FloatNetworks, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rival, "find_spec", lambda _: None)
    assert ways(stream_rivals(engine, networks, images, 2)) == {
        program: [f"{program}, {count}" for count in ("1 stream", "2 streams", "4 streams")]
        for program in ("OpenVINO int8", "OpenVINO binary f32")
    } | {"ONNX Runtime int8": ["ONNX Runtime int8, 2 sessions"]}
    many = stream_rivals(engine, networks, images, 8)
    assert ways(many)["OpenVINO int8"] == [
        f"OpenVINO int8, {count}" for count in ("1 stream", "4 streams", "8 streams", "16 streams")
    ]
    assert all(not one.call and one.reason for rivals in many.values() for one in rivals)


def test_what_is_bound_with_streams_computes_the_batch_in_each(
    found: dict[str, Rival], engine: Engine, networks: FloatNetworks, images: Tensor
) -> None:
    with torch.inference_mode():
        programs = stream_rivals(engine, networks, images, 1)
    for program, rivals in programs.items():
        once, *others = rivals
        assert all("OpenVINO makes 1 streams" in one.reason for one in others)
        assert once.agreed == (None if program.endswith("int8") else (9, 9))
        outputs = once.bound(images)()
        assert len(outputs) == (1 if program.startswith("ONNX") else 2)
        alone = found[program].bound(images)()
        assert all(torch.allclose(output, alone, rtol=0.0, atol=1e-5) for output in outputs)
