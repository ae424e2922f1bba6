"""Which backend runs a node, found without running it."""

import pytest
import torch

from biper_engine.errors import BackendUnavailableError
from biper_engine.geometry import Conv2dGeometry
from biper_engine.graph.choice import backends_of, node_backend, node_geometry
from biper_engine.ops.backends import use_backend
from tests.networks_by_hand import GraphBuilder, classifier

CPU = torch.device("cpu")


def test_binary_convolutions_have_a_geometry_and_others_none() -> None:
    module = classifier().graph_module
    found = {node.name: node_geometry(module, node) for node in module.graph.nodes}
    assert found["stem"] is found["stem_bits"] is found["pool"] is None
    assert found["layer1_0"] == Conv2dGeometry(
        in_channels=33, out_channels=33, kernel_size=(3, 3), padding=(1, 1, 1, 1)
    )


def test_float_operators_have_no_backend() -> None:
    module = classifier().graph_module
    with use_backend("reference"):
        names = {node.name: node_backend(module, node, CPU) for node in module.graph.nodes}
        assert backends_of(module, CPU) == backends_of(module, None) == ("reference",)
    assert names["stem"] is None
    assert names["stem_bits"] == names["layer1_0"] == names["pool"] == "reference"


def test_a_network_without_binary_operators_has_no_backends() -> None:
    g = GraphBuilder()
    module = g.module(g.call("y", torch.ops.aten.relu.default, g.input("x")))
    assert backends_of(module, None) == ()


def test_a_backend_that_cannot_run_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIPER_BACKEND", "cuda")
    with pytest.raises(BackendUnavailableError, match="cannot run here"):
        backends_of(classifier().graph_module, CPU)


def test_computed_weights_have_no_geometry() -> None:
    g = GraphBuilder()
    bits, weight = g.input("bits"), g.input("weight")
    conv = g.call("conv", torch.ops.biper.bconv2d.default, bits, weight, in_channels=32)
    module = g.module(conv)
    assert node_geometry(module, conv) is None
    with use_backend("reference"):
        assert node_backend(module, conv, CPU) == "reference"
