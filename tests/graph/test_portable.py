"""Graphs as plain data."""

import torch

from biper_engine.graph.portable import from_portable, to_portable
from tests.networks_by_hand import classifier_graph


def test_a_portable_graph_keeps_names_and_shares_tensors() -> None:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    module = classifier_graph()
    rebuilt = from_portable(to_portable(module))
    assert str(rebuilt.graph) == str(module.graph)
    weights = (m.get_buffer("layer1.0.conv1.weight") for m in (module, rebuilt))
    assert len({weight.data_ptr() for weight in weights}) == 1
    assert torch.equal(rebuilt(images)[0], module(images)[0])
