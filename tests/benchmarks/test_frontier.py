from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec

import frontier
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from biper_engine.bench import Budget, Rival
from biper_engine.conversion.twin import folded_network
from tests.networks_by_hand import classifier

ONCE = Budget(seconds=0.0, fewest=2, most=2, warmup=0)
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def net() -> frontier.FloatNet:
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(8, 4)).eval().requires_grad_(False)
    return frontier.FloatNet(model, folded_network(model, IMAGES), side=8)


def rivals(half: Rival) -> Callable[..., list[Rival]]:
    """Stand for OpenVINO: PyTorch itself in float32 and int8, and what is given in bfloat16."""

    def made(graph: object, model: nn.Module, images: Tensor, threads: int) -> list[Rival]:
        full = Rival(name="f32", how="", call=model, wanted=model, agreed=(8, 8), rest_ms=0.1)
        return [full, half, Rival(name="int8", how="", call=model)]

    return made


def test_every_network_is_timed_in_turn_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = net()
    half = Rival(name="bf16", how="", call=lambda x: 1.5 * found.model(x))
    monkeypatch.setattr(frontier, "openvino_float_rivals", rivals(half))
    with torch.inference_mode():
        values = frontier.contest({"B, bits": classifier()}, {"S": found}, 2, 1, ONCE)
    values = json.loads(json.dumps(values))
    wanted = ["B, bits", "S, float32", "S, bfloat16", "S, int8"]
    assert values["batch"] == 2
    assert list(values["contestants"]) == list(values["alone_ms"]) == wanted
    assert all(len(taken["samples_ms"]) == 2 for taken in values["contestants"].values())
    assert values["largest_relative_difference"] == {
        "S, float32": 0.0,
        "S, bfloat16": pytest.approx(0.5),
        "S, int8": 0.0,
    }
    assert values["images_agreed"] == {"S, float32": [8, 8]}
    assert values["did_not_run"] == {}


def test_without_bfloat16_the_rest_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    half = Rival(name="bf16", how="", reason="no such instructions")
    monkeypatch.setattr(frontier, "openvino_float_rivals", rivals(half))
    values = frontier.contest({}, {"S": net()}, 2, 1, ONCE)
    assert list(values["contestants"]) == ["S, float32", "S, int8"]
    assert values["did_not_run"] == {"S, bfloat16": "no such instructions"}


def test_nothing_is_timed_where_float32_does_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Rival(name="f32", how="", reason="it agrees on 0 of 8 images only")
    monkeypatch.setattr(frontier, "openvino_float_rivals", lambda *_: [wrong, wrong, wrong])
    with pytest.raises(RuntimeError, match=r"Nothing was timed\. S, float32: it agrees on 0"):
        frontier.contest({"B, bits": classifier()}, {"S": net()}, 2, 1, ONCE)


@pytest.mark.deep
def test_small_on_openvino_gives_pytorchs_logits() -> None:
    absent = [name for name in ("onnx", "onnxscript", "openvino") if find_spec(name) is None]
    if absent:
        pytest.skip(f'{", ".join(absent)} not installed: pip install "biper-engine[bench]"')
    entries, small = frontier.float_net("MobileNetV3-Small")
    with torch.inference_mode():
        values = frontier.contest({}, {"S": small}, 1, 1, ONCE)
    assert values["images_agreed"] == {"S, float32": [8, 8]}
    assert values["largest_relative_difference"]["S, float32"] < 1e-4
    assert [(one.runs, one.bytes) for one in entries] == [
        ("float32", 4 * 2_542_856),
        ("bfloat16", 2 * 2_542_856),
        ("int8", 2_542_856),
    ]
    assert {one.top1 for one in entries} == {67.4}


def test_networks_have_the_statistics_of_what_they_see_and_leave_the_generator_alone() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=16), nn.BatchNorm2d(4))

    before = torch.get_rng_state()
    model = frontier.as_if_trained(build, 224)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    images = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(4))
    outputs = model(images)
    # 1,568 values for each channel
    torch.testing.assert_close(outputs.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.1)
    torch.testing.assert_close(outputs.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.1)


def test_the_networks_on_bits_are_those_of_biper_and_of_two_other_papers() -> None:
    from biper_engine.models import registry
    from tests.golden.networks import BIPER

    reported = {
        name
        for name in BIPER
        if name.startswith("imagenet/") and registry.architecture(name).reported_top1 is not None
    }
    sizes = ("tiny", "small", "middle", "large")
    others = {"imagenet/reactnet_a", *(f"imagenet/bnext_{size}" for size in sizes)}
    assert all(registry.architecture(name).reported_top1 is not None for name in others)
    assert set(frontier.BINARY.values()) == reported | others


@pytest.mark.parametrize(
    ("label", "parameters", "macs"),
    [
        ("EfficientNet-B0", 5_288_548, 0.39e9),
        ("EfficientNet-B3", 12_233_232, 1.8e9),
        ("ResNet-50", 25_557_032, 4.1e9),
    ],
)
def test_float_networks_have_the_published_parameters_and_work(
    label: str, parameters: int, macs: float
) -> None:
    build, side, _, _ = frontier.FLOAT[label]
    network = build().eval()
    assert frontier.parameters(network) == parameters  # of the usual PyTorch model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = network(torch.zeros(1, 3, side, side))
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.03)  # of the papers
    assert logits.shape == (1, 1000)
