"""Forms of inputs and outputs, in files and back."""

import copy
import json
import math
import pickle
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from biper_engine.engine import load
from biper_engine.errors import FileFormatError
from biper_engine.graph.structure import Leaf, structure_of
from biper_engine.serialization.forms import decode_form, encode_form
from tests.networks_by_hand import GraphBuilder, engine_of, signature

Out = namedtuple("Out", ["logits", "aux"])
_aten = torch.ops.aten

FORMS: list[Any] = [
    0,
    (0, [0, 0]),
    {"b": 0, "a": (0,)},
    OrderedDict(b=0, a=[0]),
    Out(0, {"x": 0}),
    [Out(0, 0), OrderedDict(z=Out(0, 0))],
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_form_round_trips(form: Any) -> None:
    spec = pytree.tree_structure(form)
    encoded = encode_form(spec, "outputs")
    decoded = pytree.tree_map(lambda leaf: 0, decode_form(encoded))
    assert decoded == form
    assert repr(decoded) == repr(form)
    assert encode_form(pytree.tree_structure(decoded), "outputs") == encoded


def test_constants_round_trip() -> None:
    form = (Leaf(), None, 1, 1.0, True, "x", math.inf)
    encoded = encode_form(structure_of(form), "outputs")
    assert json.loads(json.dumps(encoded)) == encoded
    decoded = decode_form(encoded)
    assert repr(decoded[1:]) == repr(form[1:])
    assert structure_of(decoded) == structure_of(form)


def test_a_loaded_named_tuple_has_the_fields_of_the_saved_one() -> None:
    made = decode_form(encode_form(pytree.tree_structure(Out(0, 0)), "outputs"))
    assert (made._fields, type(made).__name__) == (("logits", "aux"), "Out")
    assert (made.logits, made.aux) == tuple(made)
    assert isinstance(made, tuple)
    for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert type(again) is type(made)


@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            1,
            "x",
            {"value": []},
            {"float": "1"},
            [],
            {},
            {"set": ["*"]},
            {"list": ["*"], "tuple": []},
            {"dict": [["a"]]},
        ),
        *({"dict": [["a", "*"], ["a", "*"]]}, {"dict": [[1, "*"]]}, {"ordered": {"a": "*"}}),
        *({"namedtuple": {"name": "Out", "fields": [["_x", "*"]]}},),
        *({"namedtuple": {"name": "class", "fields": []}}, {"namedtuple": {"name": "Out"}}),
        {"namedtuple": {"name": "Out", "fields": [["a", "*"], ["a", "*"]]}},
        {"namedtuple": {"name": "Out", "fields": [["a", "*"]], "more": 1}},
    ],
)
def test_an_invalid_form_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"not a form|not a key|key twice|not a named tuple"):
        decode_form(value)


def test_deep_forms_are_refused() -> None:
    form: Any = 0
    encoded: Any = "*"
    for _ in range(40):
        form, encoded = (form,), {"tuple": [encoded]}
    with pytest.raises(ValueError, match="more than 32 deep"):
        decode_form(encoded)
    with pytest.raises(FileFormatError, match="outputs are nested more than 32 deep"):
        encode_form(pytree.tree_structure(form), "outputs")


def test_constants_and_named_tuples_leave_a_loaded_engine(tmp_path: Path) -> None:
    g = GraphBuilder()
    x = g.input("x")
    y = g.call("y", _aten.relu.default, x)
    size = g.call("size", _aten.sym_size.int, x, 0)
    form = signature({"x": (4,)}, (0,), {}, Out(0, [0, 0, 0, 0, OrderedDict(size=0)]))
    module = g.module(y, None, 3, 0.5, "words", size)
    engine_of(module, form).save(tmp_path / "net.biper")
    engine = load(tmp_path / "net.biper")
    for images in (1, 3):
        out = engine(torch.ones(images, 4))
        assert out.logits.shape == (images, 4)
        assert out.aux == [None, 3, 0.5, "words", OrderedDict(size=images)]
    again = pickle.loads(pickle.dumps(engine))
    assert again(torch.ones(2, 4)).aux[0] is None
