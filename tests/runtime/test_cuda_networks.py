"""Whole networks on the CUDA backend's kernels, run by the emulator."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import biper_engine
from biper_engine import models
from biper_engine.graph.reading import biper_op
from biper_engine.ops import backends
from biper_engine.ops.backends import Backend, use_backend

pytestmark = pytest.mark.deep


@pytest.fixture
def cuda(emulated_cuda: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Force the CUDA backend, emulated."""
    monkeypatch.setitem(backends._REGISTERED, "cuda", emulated_cuda)
    with use_backend("cuda"):
        yield


def network(name: str) -> nn.Module:
    """Return a network whose normalisation has something to do."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = models.build(name).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            size = layer.running_mean.shape
            layer.running_mean.copy_(torch.randn(size, generator=generator) / 10)
            layer.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
            layer.weight.data.copy_(torch.rand(size, generator=generator) - 0.2)
            layer.bias.data.copy_(torch.randn(size, generator=generator) / 10)
    return model


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


NETWORKS = {
    "cifar10/resnet20_1w1a": 32,
    "cifar10/vgg_small_1w1a": 32,
    "imagenet/mobilenet_1w1a": 64,
}


@pytest.mark.parametrize("capability", ["90", "120"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_binary_layer_of_a_network_is_exact(
    cuda: None, monkeypatch: pytest.MonkeyPatch, name: str, capability: str
) -> None:
    if capability != "90" and name != "cifar10/resnet20_1w1a":
        pytest.skip("one network is enough for products of bytes")
    monkeypatch.setenv("BIPER_EMULATED_CAPABILITY", capability)
    model, x = network(name), images(NETWORKS[name])
    engine = biper_engine.convert(model, x, check=False)
    report = biper_engine.verify(engine, model, x)
    assert report.ok, report.table()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_plan_runs_the_fused_ends_and_agrees_with_the_reference(
    cuda: None, dtype: torch.dtype
) -> None:
    model, x = network("cifar10/resnet20_1w1a"), images(32)
    engine = biper_engine.convert(model, x, check=False, compute_dtype=dtype)
    logits = engine(x)
    assert engine._plan._plan is not None
    called = {biper_op(node) for node in engine._plan._plan.module.graph.nodes}
    assert {"stem", "pooled_linear"} < called
    with use_backend("reference"):
        expected = engine(x)
    # A rounding at the stem flips the bit of a pixel that sits on its threshold, hence logits: of
    # 20 layers on random weights some do.
    assert (logits - expected).abs().max() < 0.2 * expected.abs().max()
    assert torch.equal(logits.argmax(1), expected.argmax(1))
