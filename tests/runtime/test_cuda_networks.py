"""Whole networks on the CUDA backend's kernels, run by the emulator."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import nn

import biper_engine
from biper_engine import models
from biper_engine.graph.reading import biper_op
from biper_engine.ops import backends
from biper_engine.ops.backends import Backend, use_backend
from tests.images import images

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


NETWORKS = {
    "cifar10/resnet20_1w1a": 32,
    "cifar10/vgg_small_1w1a": 32,
    "imagenet/mobilenet_1w1a": 64,
}
CAPABILITIES = ("90", "120")


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("cifar10/resnet20_1w1a", "90"),
        *(
            pytest.param(*case, marks=pytest.mark.weekly)
            for case in product(NETWORKS, CAPABILITIES)
        ),
    ],
)
def test_every_binary_layer_of_a_network_is_exact(
    cuda: None, monkeypatch: pytest.MonkeyPatch, name: str, capability: str
) -> None:
    monkeypatch.setenv("BIPER_EMULATED_CAPABILITY", capability)
    model, x = network(name), images(2, 3, *[NETWORKS[name]] * 2, seed=1)
    engine = biper_engine.convert(model, x, check=False)
    report = biper_engine.verify(engine, model, x)
    assert report.ok, report.table()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        *(pytest.param(d, marks=pytest.mark.weekly) for d in (torch.float32, torch.bfloat16)),
    ],
)
def test_a_plan_runs_the_fused_ends_and_agrees_with_the_reference(
    cuda: None, dtype: torch.dtype
) -> None:
    model, x = network("cifar10/resnet20_1w1a"), images(2, 3, 32, 32, seed=1)
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
