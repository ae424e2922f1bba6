"""A converted network, which files hold and engines run."""

from pathlib import Path

import pytest
import torch

from biper_engine import serialization
from biper_engine.converted import ConvertedNetwork, Proof
from biper_engine.engine import Engine
from tests.networks_by_hand import classifier, classifier_graph, leaf_report, signature


def test_a_signature_that_does_not_fit_the_graph_is_refused() -> None:
    module, report = classifier_graph(), leaf_report()
    other = signature({"picture": (3, 8, 8)}, (0,), {}, 0)
    with pytest.raises(ValueError, match=r"names the inputs \['picture'\], but .* \['image'\]"):
        ConvertedNetwork(module, signature=other, report=report)
    other = signature({"image": (3, 8, 8)}, (0,), {}, [0, 0])
    with pytest.raises(ValueError, match=r"`signature.out_spec` has 2 leaves, but .* returns 1"):
        ConvertedNetwork(module, signature=other, report=report)


def test_files_hold_one_and_engines_run_one(tmp_path: Path) -> None:
    engine = classifier()
    assert engine.network.proof is None
    serialization.write(engine.network, tmp_path / "net.biper")
    network = serialization.read(tmp_path / "net.biper")
    assert isinstance(network.proof, Proof)
    assert network.device == torch.device("cpu")
    for name in ("report", "metadata", "provenance", "options", "signature"):
        assert getattr(network, name) == getattr(engine, name), name
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(Engine(network)(images), engine(images))
    assert Engine(network).network.proof is network.proof
