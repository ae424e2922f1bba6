"""`.biper` files: what survives saving and loading, and what cannot be saved."""

import hashlib
import json
import os
import re
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils import _pytree as pytree

from biper_engine.engine import Engine, load
from biper_engine.errors import FileFormatError
from biper_engine.graph.signature import Signature
from biper_engine.serialization import container
from tests.networks_by_hand import GraphBuilder, classifier, engine_of, signature, two_inputs

_aten = torch.ops.aten


def one_call(target: object, *args: object, **kwargs: object) -> Engine:
    """An engine of one operator on one input."""
    g = GraphBuilder()
    x = g.input("x")
    module = g.module(g.call("y", target, x, *args, **kwargs))
    return engine_of(module, signature({"x": (4,)}, (0,), {}, 0))


def test_everything_round_trips(tmp_path: Path, images: Tensor) -> None:
    engine = classifier()
    engine.save(tmp_path / "net.biper")
    loaded = load(tmp_path / "net.biper")
    assert torch.equal(loaded(images), engine(images))
    names, loaded_names = ([n.name for n in e.graph_module.graph.nodes] for e in (engine, loaded))
    assert loaded_names == names
    for name in ("report", "metadata", "provenance", "options", "signature"):
        assert getattr(loaded, name) == getattr(engine, name), name
    assert list(loaded.state_dict()) == list(engine.state_dict())
    assert loaded.proof is not None
    assert not any("proof" in name for name in loaded.state_dict())


def test_pytrees_round_trip(tmp_path: Path) -> None:
    engine = two_inputs()
    engine.save(tmp_path / "net.biper")
    image, mask = torch.randn(2, 3, 6, 6), torch.ones(2, 1, 6, 6)
    result = load(tmp_path / "net.biper")(image, extra={"mask": mask})
    torch.testing.assert_close(result, engine(image, extra={"mask": mask}), rtol=0, atol=0)


def test_equal_engines_give_equal_files(tmp_path: Path, images: Tensor) -> None:
    engine = classifier()
    engine.save(tmp_path / "a.biper")
    engine(images)
    engine.save(tmp_path / "b.biper")
    load(tmp_path / "a.biper").save(tmp_path / "c.biper")
    first = (tmp_path / "a.biper").read_bytes()
    assert first == (tmp_path / "b.biper").read_bytes() == (tmp_path / "c.biper").read_bytes()


def test_a_file_is_plain_safetensors_with_a_documented_checksum(tmp_path: Path) -> None:
    path = tmp_path / "net.biper"
    classifier().save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["biper"])
        assert "layer1.0.conv1.weight" in set(file.keys())
    assert header["format"] == 0
    assert {"input": "image"} in header["graph"]
    assert header["metadata"]["class_names"] == ["a", "b"]
    zeroed = path.read_bytes().replace(header["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest() == header["sha256"]


def test_a_file_names_no_aten_overload_and_pickles_nothing(tmp_path: Path) -> None:
    path = tmp_path / "net.biper"
    classifier().save(path)
    data = path.read_bytes()
    assert b"aten" not in data
    assert b"torch" not in data


def test_infinities_round_trip(tmp_path: Path) -> None:
    one_call(_aten.hardtanh.default, float("-inf"), float("inf")).save(tmp_path / "net.biper")
    node = next(n for n in load(tmp_path / "net.biper").graph_module.graph.nodes if n.name == "y")
    assert node.args[1:] == (float("-inf"), float("inf"))


def test_dtypes_of_constants_round_trip(tmp_path: Path) -> None:
    g = GraphBuilder()
    x = g.input("x")
    outputs = [x]
    for i, dtype in enumerate((torch.bool, torch.int64, torch.float16, torch.bfloat16)):
        outputs.append(g.constant(f"c{i}", torch.tensor([0, 1, 1]).to(dtype)))
    form = signature({"x": (1,)}, (0,), {}, [0] * 5)
    engine = engine_of(g.module(*outputs), form)
    engine.save(tmp_path / "net.biper")
    x = torch.zeros(1, 1)
    torch.testing.assert_close(load(tmp_path / "net.biper")(x), engine(x), rtol=0, atol=0)


def test_defaults_outside_the_closed_list_are_left_out(tmp_path: Path) -> None:
    one_call(_aten.clone.default, memory_format=None).save(tmp_path / "net.biper")
    assert load(tmp_path / "net.biper")(torch.ones(1, 4)).tolist() == [[1.0] * 4]


def test_a_loaded_engine_works_after_loading_in_inference_mode(tmp_path: Path) -> None:
    classifier().save(tmp_path / "net.biper")
    with torch.inference_mode():
        engine = load(tmp_path / "net.biper")
    engine.load_state_dict(classifier(1).state_dict())


# -- what cannot be written -----------------------------------------------------------------------


def test_an_operator_outside_the_closed_list_is_named_and_no_file_is_left(tmp_path: Path) -> None:
    engine = one_call(_aten.special_bessel_j0.default)
    assert engine(torch.zeros(1, 4)).shape == (1, 4)
    with pytest.raises(FileFormatError, match=r"node 'y' calls aten.special_bessel_j0.default"):
        engine.save(tmp_path / "net.biper")
    assert list(tmp_path.iterdir()) == []


def test_an_argument_outside_the_closed_list_is_named(tmp_path: Path) -> None:
    engine = one_call(_aten.linalg_vector_norm.default, 2, [1], dtype=torch.float32)
    with pytest.raises(
        FileFormatError, match=r"node 'y' passes `dtype` \(=torch.float32\) to norm"
    ):
        engine.save(tmp_path / "net.biper")


def test_a_value_without_a_form_is_named(tmp_path: Path) -> None:
    engine = one_call(_aten.mul.Tensor, 1j)
    with pytest.raises(FileFormatError, match=r"`other` .* of node 'y' has no form"):
        engine.save(tmp_path / "net.biper")


def test_other_containers_are_named(tmp_path: Path) -> None:
    engine = classifier()
    out = pytree.tree_structure({1.5: 0})
    engine.signature = Signature(engine.signature.in_spec, out, engine.signature.inputs)
    with pytest.raises(FileFormatError, match="outputs contain a dict; files hold tuples, lists"):
        engine.save(tmp_path / "net.biper")


def test_options_that_are_not_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="not JSON"):
        classifier(options={"dtype": torch.float32}).save(tmp_path / "net.biper")
    with pytest.raises(FileFormatError, match="not JSON"):
        classifier(options={"limit": float("nan")}).save(tmp_path / "net.biper")


def test_a_graph_that_cannot_run_is_not_written(tmp_path: Path) -> None:
    engine = one_call(_aten.reshape.default, [-1, 3])
    with pytest.raises(FileFormatError, match=r"Node 'y' \(reshape\) does not fit"):
        engine.save(tmp_path / "net.biper")
    assert list(tmp_path.iterdir()) == []


# -- atomic writes --------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "net.biper"
    classifier(0).save(path)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    if failing == "fsync":
        monkeypatch.setattr(container.os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        classifier(1).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_directory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "absent"))):
        classifier().save(tmp_path / "absent" / "net.biper")


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_new_file_has_the_users_permissions_and_links_are_followed(tmp_path: Path) -> None:
    real, link = tmp_path / "real.biper", tmp_path / "link.biper"
    link.symlink_to(real)
    old = os.umask(0o022)
    try:
        classifier().save(link)
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o644
