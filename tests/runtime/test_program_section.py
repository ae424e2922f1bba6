"""The native program in a file: what it refers to, and that it makes the same program again."""

from __future__ import annotations

import json
import operator
import re
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
from biper_engine.runtime import program_section
from biper_engine.serialization import check_program, container
from biper_engine.serialization.native_program import SEAL, seal_of
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


def test_a_network_that_returns_a_tensor_twice_has_the_reason(tmp_path: Path) -> None:
    g = GraphBuilder(1)
    total = g.call("sum", torch.ops.aten.add.Tensor, g.input("x"), g.constant("c", torch.ones(5)))
    engine = engine_of(g.module(total, total), signature({"x": (5,)}, (0,), {}, (0, 1)))
    section, _ = saved(engine, tmp_path)
    assert set(section) == {"version", "reason"}
    assert section["reason"].endswith("or returns a tensor several times")


def test_a_network_without_tensors_has_no_program_as_it_has_none_in_python(tmp_path: Path) -> None:
    g = GraphBuilder(1)
    made = g.call("made", torch.ops.aten.exp.default, g.input("x"))
    engine = engine_of(g.module(made), signature({"x": (5,)}, (0,), {}, 0))
    section, _ = saved(engine, tmp_path)
    assert section == {
        "version": 2, "reason": "it has no tensors, and runs operator by operator"
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


def rewritten(
    path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], *, seal: bool = False
) -> Path:
    """Write an edited file with a right checksum, and perhaps with a right seal."""
    kept = {key: value for key, value in header.items() if key not in ("format", "sha256")}
    if seal:
        kept[SEAL] = seal_of(kept, tensors)
    container.write(path, kept, tensors)
    return path


def spliced(part: str, folder: Path) -> Path:
    """Put a part of one network's file into that of another, which differs in its numbers only.

    Args:
        part: "section", the program with its tensors and its seal; "steps", "weights" or "graph".
        folder: for the files.
    """
    (header, tensors), (other, others) = (container.read(one) for one in two_classifiers(folder))
    if part == "section":
        header["program"], header[SEAL] = other["program"], other[SEAL]
        own = {name: tensor for name, tensor in others.items() if name.startswith("program/")}
        tensors = {k: v for k, v in tensors.items() if not k.startswith("program/")} | own
    elif part == "steps":
        header["program"]["steps"] = other["program"]["steps"]
    elif part == "graph":
        header["graph"] = other["graph"]
    else:
        tensors = {name: others[name] for name in tensors}
    return rewritten(folder / "spliced.biper", header, tensors)


def two_classifiers(folder: Path) -> list[Path]:
    """Save two networks of one shape, with other weights and other scalars."""
    paths = []
    for seed, least in ((1, -1.0), (2, -0.5)):
        g = GraphBuilder(seed)
        clamped = g.call("clamped", torch.ops.aten.clamp.default, g.input("x"), least, 1.0)
        weight, bias = g.constant("weight", g.normal(4, 6)), g.constant("bias", g.normal(4))
        made = g.call("made", torch.ops.aten.linear.default, clamped, weight, bias)
        engine = engine_of(g.module(made), signature({"x": (6,)}, (0,), {}, 0))
        paths.append(folder / f"classifier{seed}.biper")
        engine.save(paths[-1], program=True)
        assert "steps" in container.read(paths[-1])[0]["program"]
    return paths


PARTS = ("section", "steps", "weights", "graph")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_another_file_is_refused(part: str, tmp_path: Path) -> None:
    path = spliced(part, tmp_path)
    with pytest.raises(FileFormatError, match=r"spliced.biper: .*not saved together with its gr"):
        load(path)


@pytest.mark.parametrize("seal", ["0" * 64, None, 7, ["a"]])
def test_a_wrong_seal_is_refused(seal: Any, tmp_path: Path) -> None:
    header, tensors = container.read(two_classifiers(tmp_path)[0])
    path = rewritten(tmp_path / "edited.biper", {**header, SEAL: seal}, tensors)
    with pytest.raises(FileFormatError, match="not saved together"):
        load(path)
    del header[SEAL]
    with pytest.raises(FileFormatError, match="not saved together"):
        load(rewritten(tmp_path / "edited.biper", header, tensors))


def test_a_seal_depends_on_every_bit_and_name(tmp_path: Path) -> None:
    header, tensors = container.read(two_classifiers(tmp_path)[0])
    assert header[SEAL] == seal_of(header, tensors)
    bias = tensors["bias"]
    changed = [
        {**tensors, "bias": torch.cat([bias[:3], -bias[3:]])},
        {**tensors, "bias": bias.view(2, 2)},
        {**tensors, "bias": bias.view(torch.int32)},
        {**{k: v for k, v in tensors.items() if k != "bias"}, "bias2": bias},
        {**tensors, "more": torch.zeros(0)},
    ]
    assert header[SEAL] not in {seal_of(header, each) for each in changed}
    proof = {**tensors, "proof/output/0": torch.zeros(1)}  # which the file's readers compare
    assert header[SEAL] == seal_of(header, proof)


def test_files_from_before_seals_load(tmp_path: Path) -> None:
    path = two_classifiers(tmp_path)[0]
    header, tensors = container.read(path)
    header["program"]["version"] = 1
    del header[SEAL]
    old = load(rewritten(tmp_path / "old.biper", header, tensors))
    x = torch.randn(3, 6)
    assert torch.equal(old(x), load(path)(x))
    assert check_program(tmp_path / "old.biper", program_section) is None
    old.save(tmp_path / "new.biper", program=True)
    assert (tmp_path / "new.biper").read_bytes() == path.read_bytes()


def test_zeros_of_two_signs_are_two_programs(tmp_path: Path) -> None:
    g = GraphBuilder(1)
    clamped = g.call("clamped", torch.ops.aten.clamp.default, g.input("x"), 0.0, 1.0)
    made = g.call("made", torch.ops.aten.linear.default, clamped, g.constant("w", g.normal(4, 6)))
    engine = engine_of(g.module(made), signature({"x": (6,)}, (0,), {}, 0))
    engine.save(tmp_path / "net.biper", program=True)
    assert check_program(tmp_path / "net.biper", program_section) is True
    header, tensors = container.read(tmp_path / "net.biper")
    text = json.dumps(header["program"])
    assert "0.0" in text
    header["program"] = json.loads(re.sub(r"(?<![\d.-])0\.0(?!\d)", "-0.0", text))
    edited = rewritten(tmp_path / "edited.biper", header, tensors, seal=True)
    load(edited)
    assert check_program(edited, program_section) is False
