"""The forms of inputs and outputs: containers with tensors and constants as leaves.

"*" is a tensor, {"value": ...} a constant, {"float": "inf"} one that JSON cannot write. A container
is an object with one key, its kind:

    {"tuple": [...]}  {"list": [...]}  {"dict": [[key, form], ...]}  {"ordered": [[key, form], ...]}
    {"size": [size, ...]}  {"returned": {"name": "topk", "items": [...]}}
    {"namedtuple": {"name": name, "fields": [[field, form], ...]}}
    {"dataclass": {"name": name, "fields": [[field, form], ...], "mapping": false}}

Dicts keep their order, so they are lists of pairs; keys are strings or integers. A named tuple or a
dataclass is saved with the names of its fields; the loaded one has the same fields, and its own
class. One that is also a mapping, as the outputs of `transformers` are, can be indexed.
"""

from __future__ import annotations

import dataclasses
import functools
import keyword
import math
from collections import OrderedDict, namedtuple
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from biper_engine.errors import FileFormatError
from biper_engine.graph.structure import CONSTANT_TYPES, Leaf, marked_structure

__all__ = ["decode_form", "encode_constant", "encode_form"]

_TENSOR = "*"
_MAX_DEPTH = 32
_MAX_NAME = 200
_MAX_FIELDS = 1024
_KEYS = (str, int)
_RETURNED = {
    name: kind
    for name, kind in vars(torch.return_types).items()
    if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "n_sequence_fields")
}
"""The classes of results of `torch.topk` and others, by their names."""


def encode_form(spec: pytree.TreeSpec, what: str) -> Any:
    """Return the JSON form of a pytree.

    Args:
        spec: spec of inputs or outputs.
        what: "inputs" or "outputs", for messages.

    Raises:
        FileFormatError: it contains a container that files cannot hold.
    """
    return _encode(marked_structure(spec), what, 0)


def encode_constant(value: Any) -> dict[str, Any]:
    """Return the JSON form of a constant among inputs or outputs."""
    plain = not isinstance(value, float) or math.isfinite(value)
    return {"value": value} if plain else {"float": str(value)}


def _encode(value: Any, what: str, depth: int) -> Any:
    if isinstance(value, Leaf):
        return _TENSOR
    if type(value) in CONSTANT_TYPES:
        return encode_constant(value)
    if depth > _MAX_DEPTH:
        raise FileFormatError(
            f"The engine cannot be saved: its {what} are nested more than {_MAX_DEPTH} deep."
        )

    def pairs(items: Iterable[tuple[Any, Any]]) -> list[Any]:
        return [[key, _encode(item, what, depth + 1)] for key, item in items]

    if type(value) in (tuple, list):
        return {type(value).__name__: [_encode(item, what, depth + 1) for item in value]}
    if _RETURNED.get(type(value).__name__) is type(value):
        items = [_encode(item, what, depth + 1) for item in value]
        return {"returned": {"name": type(value).__name__, "items": items}}
    if type(value) is torch.Size and all(type(size) is int for size in value):
        return {"size": list(value)}
    if type(value) in (dict, OrderedDict) and all(type(key) in _KEYS for key in value):
        return {"ordered" if type(value) is OrderedDict else "dict": pairs(value.items())}
    fields = getattr(type(value), "_fields", None)
    if type(value).__bases__ == (tuple,) and isinstance(fields, tuple):
        name = type(value).__name__
        return {"namedtuple": {"name": name, "fields": pairs(zip(fields, value, strict=True))}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        fields = pairs((name, getattr(value, name)) for name in held)
        name, mapping = type(value).__name__, hasattr(type(value), "__getitem__")
        return {"dataclass": {"name": name, "fields": fields, "mapping": mapping}}
    raise FileFormatError(
        f"The engine cannot be saved: its {what} contain a {type(value).__name__}; files hold "
        "tuples, lists, named tuples, dataclasses, and dicts whose keys are strings or integers. "
        "Wrap the model to take and return those."
    )


def decode_form(value: Any, depth: int = 0) -> Any:
    """Return a tree like the encoded one, with a `Leaf` for every tensor.

    Raises:
        ValueError: it is not a valid form.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"a form is nested more than {_MAX_DEPTH} deep")
    match value:
        case "*":
            return Leaf()
        case {"value": constant, **rest} if not rest and type(constant) in CONSTANT_TYPES:
            return constant
        case {"float": "inf" | "-inf" | "nan" as number, **rest} if not rest:
            return float(number)
        case {"tuple": list(items), **rest} if not rest:
            return tuple(decode_form(item, depth + 1) for item in items)
        case {"list": list(items), **rest} if not rest:
            return [decode_form(item, depth + 1) for item in items]
        case {"returned": {"name": str(name), "items": list(items), **more}, **rest} if not (
            rest or more
        ):
            return _returned(name, [decode_form(item, depth + 1) for item in items])
        case {"size": list(sizes), **rest} if not rest and all(map(_is_size, sizes)):
            return torch.Size(sizes)
        case {"dict": list(items), **rest} if not rest:
            return dict(_pairs(items, depth))
        case {"ordered": list(items), **rest} if not rest:
            return OrderedDict(_pairs(items, depth))
        case {"namedtuple": {"name": str(name), "fields": list(items), **more}, **rest} if not (
            rest or more
        ):
            fields = _pairs(items, depth)
            made = _named_tuple(name, tuple(field for field, _ in fields))
            return made(*(form for _, form in fields))
        case {
            "dataclass": {
                "name": str(name),
                "fields": list(items),
                "mapping": bool(mapping),
                **more,
            },
            **rest,
        } if not (rest or more):
            fields = _pairs(items, depth)
            made = _record(name, tuple(field for field, _ in fields), mapping)
            return made(*(form for _, form in fields))
    raise ValueError(f"{value!r:.100} is not a form of inputs or outputs")


def _returned(name: str, items: list[Any]) -> Any:
    """Return a result of a PyTorch function, whose class has its name and a number of parts."""
    kind = _RETURNED.get(name)
    if kind is None or kind.n_sequence_fields != len(items):
        raise ValueError(f"{name!r:.100} with {len(items)} parts is not a result of PyTorch")
    return kind(items)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _pairs(items: list[Any], depth: int) -> list[tuple[Any, Any]]:
    found = []
    for item in items:
        match item:
            case [key, form] if type(key) in _KEYS:
                found.append((key, decode_form(form, depth + 1)))
            case _:
                raise ValueError(f"{item!r:.100} is not a key with a form")
    if len(dict(found)) != len(found):
        raise ValueError("a form has a key twice")
    return found


@functools.lru_cache(maxsize=256)
def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    """Return the class of named tuples with these fields, the same class for equal names."""
    _require_names(name, fields, "named tuple")
    make: Any = namedtuple
    made = make(name, fields)
    made.__module__ = __name__
    made.__reduce__ = _reduce  # the class is in no module from which pickle could import it
    return made


@functools.lru_cache(maxsize=256)
def _record(name: str, fields: tuple[str, ...], mapping: bool) -> Any:
    """Return the dataclass with these fields, the same class for equal names."""
    _require_names(name, fields, "dataclass")
    namespace: dict[str, Any] = {"__reduce__": _reduce_record}
    if mapping:
        namespace["__getitem__"] = _item
    made = dataclasses.make_dataclass(name, fields, namespace=namespace, eq=False)
    made.__module__ = __name__
    return made


def _item(record: Any, key: Any) -> Any:
    """Return a field by its name, or by its position among those that are not None."""
    held = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    held = {name: value for name, value in held.items() if value is not None}
    return held[key] if isinstance(key, str) else tuple(held.values())[key]


def _reduce_record(record: Any) -> tuple[Any, ...]:
    names = tuple(field.name for field in dataclasses.fields(record))
    values = tuple(getattr(record, name) for name in names)
    kind = type(record)
    return _rebuilt_record, (kind.__name__, names, hasattr(kind, "__getitem__"), values)


def _rebuilt_record(
    name: str, fields: tuple[str, ...], mapping: bool, values: tuple[Any, ...]
) -> Any:
    return _record(name, fields, mapping)(*values)


def _require_names(name: str, fields: tuple[Any, ...], kind: str) -> None:
    if len(fields) > _MAX_FIELDS or not all(map(_is_name, (name, *fields))):
        raise ValueError(f"{name!r:.100} with the fields {fields!r:.200} is not a {kind}")


def _is_name(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    plain = text.isidentifier() and text.isascii() and len(text) <= _MAX_NAME
    return plain and not keyword.iskeyword(text) and not text.startswith("_")


def _reduce(value: Any) -> tuple[Any, ...]:
    return _rebuilt, (type(value).__name__, value._fields, tuple(value))


def _rebuilt(name: str, fields: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    return _named_tuple(name, fields)(*values)
