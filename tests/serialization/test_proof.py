"""Proofs and checks of backends: equal, or where they first differ and by how much."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine.engine import Engine, load
from biper_engine.errors import BackendUnavailableError
from biper_engine.graph.signature import InputSpec
from biper_engine.ops import reference
from biper_engine.ops.backends import _REGISTERED as REGISTERED
from biper_engine.ops.backends import use_backend
from biper_engine.serialization import check_backend, example_inputs, replay
from tests.networks_by_hand import classifier, two_inputs


@pytest.fixture
def loaded(tmp_path: Path) -> Engine:
    classifier().save(tmp_path / "net.biper")
    return load(tmp_path / "net.biper")


class FaultyBackend(reference.ReferenceBackend):
    """The reference under another name, which flips one bit of every bit pool."""

    name = "cpu"

    def bmaxpool2d(self, *args: Any) -> Tensor:
        packed = super().bmaxpool2d(*args).clone()
        packed.view(-1)[0] ^= 4
        return packed


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTERED, "cpu", FaultyBackend())


def test_inputs_come_from_shake_256() -> None:
    spec = InputSpec("image", torch.float32, (None, 1, 2))
    (value,) = example_inputs([spec], seed=7)
    stream = hashlib.shake_256(b"7:image").digest(4)
    expected = torch.tensor(list(stream)).float().reshape(2, 1, 2) / 127.5 - 1
    assert torch.equal(value, expected)
    assert value.abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16])
def test_inputs_have_the_dtype_that_the_network_takes(dtype: torch.dtype) -> None:
    spec = InputSpec("image", dtype, (None, 8))
    (value,) = example_inputs([spec], seed=0)
    assert value.dtype == dtype
    assert value.unique().numel() > 1


def test_a_proof_replays_bit_identically(loaded: Engine) -> None:
    report = replay(loaded.network, backend="reference")
    assert report.ok
    assert report.bit_identical
    assert (report.maps, report.node, report.max_output_difference) == (4, None, 0.0)
    assert "bit-identical" in report.table()
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_a_proof_names_the_maps_in_order(loaded: Engine) -> None:
    assert list(loaded.proof.maps) == ["stem_bits", "layer1_0", "layer1_1", "pool"]
    assert loaded.proof.values[0].shape == (2, 10)


def test_a_proof_of_several_outputs_replays(tmp_path: Path) -> None:
    two_inputs().save(tmp_path / "net.biper")
    engine = load(tmp_path / "net.biper")
    assert len(engine.proof.outputs) == 3
    assert replay(engine.network).ok


def test_large_outputs_are_hashed_but_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("biper_engine.serialization.proof._MAX_STORED_VALUES", 19)
    classifier().save(tmp_path / "net.biper")
    engine = load(tmp_path / "net.biper")
    assert not engine.proof.values
    report = replay(engine.network)
    assert report.ok
    assert report.max_output_difference is None


def test_the_first_different_map_and_its_bits_are_reported(loaded: Engine, faulty: None) -> None:
    report = replay(loaded.network, backend="cpu")
    assert not report.ok
    assert (report.node, report.bits_differ, report.reference_agrees) == ("pool", 1, True)
    assert report.max_output_difference is not None
    assert report.max_output_difference > 0
    assert "first different map: pool, 1 bits" in report.table()


def test_another_networks_proof_does_not_replay(loaded: Engine, tmp_path: Path) -> None:
    classifier(1).save(tmp_path / "other.biper")
    report = replay(loaded.network, load(tmp_path / "other.biper").proof)
    assert not report.ok
    assert (report.node, report.reference_agrees) == ("stem_bits", False)
    assert "round differently" in report.table()


def test_float_rounding_alone_does_not_fail_a_network(loaded: Engine) -> None:
    loaded.get_buffer("graph_module.fc.bias").mul_(1 + 2**-22)
    report = replay(loaded.network)
    assert report.ok
    assert not report.bit_identical
    assert "outputs differ in rounding" in report.table()


def test_an_engine_without_a_proof_says_so() -> None:
    with pytest.raises(ValueError, match="no proof: it was not loaded from a file"):
        replay(classifier().network)


def test_every_node_of_the_reference_equals_itself() -> None:
    report = check_backend(classifier().network, "reference")
    assert report.ok
    assert report.first_different is None
    assert [node.op for node in report.nodes] == [
        "binarize",
        "bconv2d_float_bits",
        "bconv2d_bits",
        "bmaxpool2d",
        "bconv2d_float",
    ]
    assert "5 of 5 nodes equal the reference" in report.table()
    assert json.loads(json.dumps(report.to_dict()))["nodes"][0]["equal"] is True


def test_each_node_is_checked_on_the_references_inputs(faulty: None) -> None:
    report = check_backend(classifier().network, "cpu")
    assert [node.node for node in report.nodes if not node.equal] == ["pool"]
    first = report.first_different
    assert first is not None
    assert (first.backend, first.different, first.total) == ("cpu", 1, 2 * 4 * 4 * 2)
    assert "pool" in report.table()
    assert not report.ok


def test_the_backend_forced_outside_is_the_one_that_is_checked(faulty: None) -> None:
    with use_backend("cpu"):
        assert {node.backend for node in check_backend(classifier().network).nodes} == {"cpu"}
        assert not replay_ok()


def replay_ok() -> bool:
    engine = classifier()
    return check_backend(engine.network, inputs=[torch.zeros(1, 3, 8, 8)]).ok


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="Unknown backend 'gpu'"):
        check_backend(classifier().network, "gpu")
