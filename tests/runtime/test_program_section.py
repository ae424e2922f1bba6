"""The native program in a file: what it refers to, and that it makes the same program again."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine.bits import pack_weight
from biper_engine.engine import Engine, load
from biper_engine.errors import FileFormatError
from biper_engine.ops.cpu_program import CpuProgram, Form, Map
from biper_engine.ops.matrix_functional import unpack_weight
from biper_engine.serialization import container
from tests.fuzz.bases import float_network
from tests.networks_by_hand import GraphBuilder, classifier, engine_of, signature, two_inputs


def saved(engine: Engine, folder: Path, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return the program of an engine's file, None for none, and the file's tensors."""
    engine.save(folder / "net.biper", **options)
    header, tensors = container.read(folder / "net.biper")
    return header.get("program"), tensors


class Remade:
    """A program made from what a file has of it, as loaders without Python do."""

    def __init__(self, section: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._maps: list[Map] = []
        self._program = CpuProgram()
        for entry in section["steps"]:
            self._add(entry)
        self.run = self._program
        forms = [[self._form(x) for x in section[key]] for key in ("inputs", "outputs")]
        planar = [self._maps[x["map"]] for x in section["inputs"] if x["planar"]]
        self._program.finish(*forms, planar=planar)

    def _add(self, entry: Mapping[str, Any]) -> None:
        if "map" in entry:
            height, width, channels, packed = entry["map"]
            self._maps.append(self._program.add_map(channels, height, width, packed=packed))
        elif "view" in entry:
            height, width, channels, _ = entry["as"]
            self._maps.append(
                self._program.view(self._maps[entry["view"]], channels, height, width)
            )
        else:
            named = {name: self._argument(value) for name, value in entry["args"].items()}
            self._maps.extend(self._program.add(entry["step"], **named))

    def _argument(self, value: Any) -> Any:
        match value:
            case {"float": text}:
                return float(text)
            case {"tensor": name, "low": low, "high": high, "channels": channels}:
                packed, values = self._tensors[name], [self._tensors[x] for x in (low, high)]
                made = unpack_weight(packed, *values, channels)
                return made.as_strided(value["sizes"], value["strides"], value["offset"])
            case {"tensor": name, "sizes": sizes, "strides": strides, "offset": offset}:
                return self._tensors[name].as_strided(sizes, strides, offset)
            case {"tensor": name}:
                return self._tensors[name]
        return value

    def _form(self, entry: Mapping[str, Any]) -> Form:
        return Form(self._maps[entry["map"]], tuple(entry["sizes"]), entry["channels_last"])


@pytest.mark.parametrize("build", [classifier, two_inputs, float_network])
def test_the_program_in_a_file_gives_the_same_answers(build: Any, tmp_path: Path) -> None:
    engine = build()
    section, tensors = saved(engine, tmp_path)
    shapes = [[3 if size is None else size for size in x.shape] for x in engine.signature.inputs]
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    for got, wanted in zip(Remade(section, tensors).run(*inputs), engine._run(inputs), strict=True):
        assert torch.equal(got, wanted)


def test_weights_are_in_a_file_once(tmp_path: Path) -> None:
    section, with_program = saved(classifier(), tmp_path)
    assert any(entry.get("step") == "conv" for entry in section["steps"])
    nothing, without = saved(classifier(), tmp_path, program=False)
    assert nothing is None
    assert with_program.keys() == without.keys()
    assert "prepacked" not in json.dumps(section)


def test_inputs_and_outputs_have_names_and_shapes(tmp_path: Path) -> None:
    section, _ = saved(float_network(), tmp_path)
    assert [(x["name"], x["sizes"]) for x in section["inputs"]] == [("x", [1, 3, 9, 8])]
    assert section["inputs"][0]["planar"]
    outputs = [(x["name"], x["sizes"]) for x in section["outputs"]]
    assert outputs == [("0", [1, 5]), ("1.map", [1, 32, 5, 4])]


def test_a_network_that_is_not_one_program_has_the_reason(tmp_path: Path) -> None:
    g = GraphBuilder(1)
    total = g.call("sum", torch.ops.aten.add.Tensor, g.input("x"), g.constant("c", torch.ones(5)))
    pair = g.call("pair", torch.ops.aten.sort.default, total, 1)
    values = g.call("values", operator.getitem, pair, 0)
    engine = engine_of(g.module(values), signature({"x": (5,)}, (0,), {}, 0))
    section, _ = saved(engine, tmp_path)
    assert set(section) == {"version", "reason"}
    assert "sort" in section["reason"]
    wanted = (torch.eye(5) + 1).sort(1).values
    assert torch.equal(load(tmp_path / "net.biper")(torch.eye(5)), wanted)


def test_a_network_without_tensors_has_no_program_as_it_has_none_in_python(tmp_path: Path) -> None:
    g = GraphBuilder(1)
    made = g.call("made", torch.ops.aten.exp.default, g.input("x"))
    engine = engine_of(g.module(made), signature({"x": (5,)}, (0,), {}, 0))
    section, _ = saved(engine, tmp_path)
    assert section == {
        "version": 1, "reason": "it has no tensors, and runs operator by operator"
    }  # fmt: skip


def turned_convolution() -> Engine:
    """A transposed convolution, whose program has weights in another order than the graph."""
    g = GraphBuilder(1)
    weight = g.constant("up.weight", g.normal(16, 32, 8, 8))
    options = [[2, 2], [0, 0], [1, 1], True, [0, 0], 1]
    up = g.call("up", torch.ops.aten.convolution.default, g.input("x"), weight, None, *options)
    return engine_of(g.module(up), signature({"x": (16, 3, 3)}, (0,), {}, 0))


def test_a_program_with_large_tensors_of_its_own_is_left_out(tmp_path: Path) -> None:
    engine = turned_convolution()
    section, tensors = saved(engine, tmp_path)
    assert "program=True" in section["reason"]
    assert not any(name.startswith("program/") for name in tensors)
    section, tensors = saved(engine, tmp_path, program=True)
    x = torch.randn(2, 16, 3, 3)
    (got,) = Remade(section, tensors).run(x)
    assert torch.equal(got, engine(x))
    assert torch.equal(load(tmp_path / "net.biper")(x), got)


def unpacked_weights() -> Engine:
    """A convolution of floats with weights that are bits in the file."""
    g = GraphBuilder(1)
    packed = g.constant("weight", pack_weight(g.normal(70, 40, 3, 3) >= 0))
    low, high = g.constant("low", g.normal(70)), g.constant("high", g.normal(70))
    unpack = torch.ops.biper.unpack_weight.default
    weight = g.call("unpacked", unpack, packed, low, high, channels=40)
    options = [None, [1, 1], [1, 1], [1, 1], 1]
    made = g.call("conv", torch.ops.aten.conv2d.default, g.input("x"), weight, *options)
    return engine_of(g.module(made), signature({"x": (40, 5, 5)}, (0,), {}, 0))


def test_weights_that_the_graph_unpacks_stay_packed_in_a_file(tmp_path: Path) -> None:
    engine, x = unpacked_weights(), torch.randn(2, 40, 5, 5)
    section, tensors = saved(engine, tmp_path)
    assert not any(name.startswith("program/") for name in tensors)
    (got,) = Remade(section, tensors).run(x)
    assert torch.equal(got, engine(x))


def test_a_wrong_entry_is_refused(tmp_path: Path) -> None:
    saved(classifier(), tmp_path)
    header, tensors = container.read(tmp_path / "net.biper")
    header = {key: value for key, value in header.items() if key not in ("format", "sha256")}
    container.write(tmp_path / "edited.biper", {**header, "program": 7}, tensors)
    with pytest.raises(FileFormatError, match="wrong entry `program`"):
        load(tmp_path / "edited.biper")
