"""Forms of inputs and outputs, in files and back."""

import copy
import dataclasses
import json
import math
import pickle
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from biper_engine.conversion import convert
from biper_engine.engine import load
from biper_engine.errors import FileFormatError
from biper_engine.graph.structure import Leaf, flatten_structure, structure_of
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
        *({"dict": [["a", "*"], ["a", "*"]]}, {"dict": [[1.5, "*"]]}, {"ordered": {"a": "*"}}),
        *({"namedtuple": {"name": "Out", "fields": [["_x", "*"]]}},),
        *({"namedtuple": {"name": "class", "fields": []}}, {"namedtuple": {"name": "Out"}}),
        {"namedtuple": {"name": "Out", "fields": [["a", "*"], ["a", "*"]]}},
        {"namedtuple": {"name": "Out", "fields": [["a", "*"]], "more": 1}},
        {"namedtuple": {"name": "Out", "fields": [[1, "*"]]}},
        *({"size": [-1]}, {"size": [True]}, {"size": ["*"]}, {"dict": [[True, "*"]]}),
        {"dataclass": {"name": "Out", "fields": [["a", "*"]]}},
        *({"returned": {"name": name, "items": ["*"]}} for name in ("topk", "Size", "nothing")),
        {"dataclass": {"name": "Out", "fields": [["a", "*"], ["a", "*"]], "mapping": False}},
        {"dataclass": {"name": "Out", "fields": [["__init__", "*"]], "mapping": True}},
        {"dataclass": {"name": "Out", "fields": [["a", "*"]], "mapping": 1}},
    ],
)
def test_an_invalid_form_is_refused(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"not a (form|key|named tuple|dataclass|result)|key twice"
    ):
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


@dataclasses.dataclass(frozen=True)
class Scores:
    logits: Any
    aux: Any = None


@dataclasses.dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """A mapping that is a dataclass, as the outputs of `transformers` are."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        held = {"logits": self.logits, "hidden": self.hidden}
        self.update({name: value for name, value in held.items() if value is not None})


pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), tuple(output)),
    lambda values, names: Output(**dict(zip(names, values, strict=True))),
    serialized_type_name="tests.Output",
)


class Head(nn.Module):
    """A binary layer; returns scores in a structure."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.made = made

    def forward(self, x: Tensor) -> Any:
        return self.made(torch.sign(x) @ torch.sign(self.weight))


STRUCTURES: list[Any] = [
    lambda y: Scores(y),
    lambda y: [Scores(y, Scores(y + 1, {"a": None})), (), {}],
    lambda y: {0: y, "rest": torch.Size([3, 4]), 7: (True, 1, 1.5, None, "x")},
    lambda y: Output(hidden=y),
    lambda y: (y.topk(2), (y > 0).any(1, keepdim=True), y.sort(1), y.max(1)),
    lambda y: Out(y, OrderedDict(z=Scores((y, y)))),
]


@pytest.mark.some(3)
@pytest.mark.parametrize("made", STRUCTURES)
def test_structures_are_equal_after_loading(made: Any, tmp_path: Path) -> None:
    model, x = Head(made).eval(), torch.randn(3, 8)
    engine = convert(model, x)
    engine.save(tmp_path / "net.biper")
    loaded = load(tmp_path / "net.biper")
    with torch.no_grad():
        wanted = flatten_structure(model(x))
        results = [one(x) for one in (engine, loaded, pickle.loads(pickle.dumps(loaded)))]
    for result in results:
        leaves, spec = flatten_structure(result)
        assert all(map(torch.equal, leaves, wanted[0]))
        assert encode_form(spec, "outputs") == encode_form(wanted[1], "outputs")
    assert type(results[0]) is type(model(x))


def test_a_loaded_dataclass_has_the_fields_of_the_saved_one() -> None:
    form = structure_of(Output(hidden=Leaf()))
    made = decode_form(encode_form(form, "outputs"))
    assert dataclasses.is_dataclass(made)
    assert made.logits is None
    assert made.hidden is made["hidden"] is made[0]
    again = pickle.loads(pickle.dumps(decode_form(encode_form(structure_of(Scores(1)), "x"))))
    assert (again.logits, again.aux) == (1, None)
    assert not hasattr(again, "__getitem__")


@dataclasses.dataclass
class Pair:
    image: Tensor
    scale: float


class Mask(NamedTuple):
    where: Tensor


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, pair: Pair, *, mask: Mask, more: Any = ()) -> Tensor:
        y = torch.sign(pair.image) @ torch.sign(self.weight) * pair.scale
        return y.masked_fill(mask.where, 0)


def test_dataclasses_and_keywords_enter_a_loaded_engine(tmp_path: Path) -> None:
    model, x = Takes().eval(), torch.randn(3, 8)
    call = {"pair": Pair(x, 0.5), "mask": Mask(x > 1)}
    engine = convert(model, call)
    engine.save(tmp_path / "net.biper")
    with torch.no_grad():
        for one in (engine, load(tmp_path / "net.biper")):
            assert torch.equal(one(Pair(x, 0.5), mask=Mask(x > 1)), model(**call))
            with pytest.raises(TypeError, match="fixed at conversion"):
                one(Pair(x, 0.25), mask=Mask(x > 1))
