"""The plain-data entries of a file's header: signature, report, metadata, provenance, options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from biper_engine.engine import Engine, InputSpec, Signature
from biper_engine.errors import FileFormatError
from biper_engine.metadata import Metadata, Provenance
from biper_engine.report import ConversionReport
from biper_engine.serialization.graph_format import DTYPES

__all__ = ["engine_arguments", "engine_entries"]

T = TypeVar("T")

_LEAF = "*"
_SMALL = 1 << 40  # sizes beyond it are damage, not tensors


def engine_entries(engine: Engine) -> dict[str, Any]:
    """Return the header entries of an engine, apart from graph and proof.

    Raises:
        FileFormatError: inputs or outputs are not nested tuples, lists and dicts of tensors.
    """
    metadata, provenance = engine.metadata, engine.provenance
    return {
        "signature": _encode_signature(engine.signature),
        "report": engine.report.to_dict(),
        "metadata": None if metadata is None else metadata.to_dict(),
        "provenance": None if provenance is None else provenance.to_dict(),
        "options": engine.options,
    }


def engine_arguments(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `Engine` arguments in a header, apart from the graph module.

    Raises:
        FileFormatError: an entry is missing or is not what `engine_entries` makes.
    """
    return {
        "signature": _entry(header, "signature", _decode_signature),
        "report": _entry(header, "report", _decode_report),
        "metadata": _entry(header, "metadata", _optional(_decode_metadata)),
        "provenance": _entry(header, "provenance", _optional(_decode_provenance)),
        "options": _entry(header, "options", _decode_options),
    }


def _entry(header: Mapping[str, Any], name: str, decode: Callable[[Any], T]) -> T:
    try:
        return decode(header[name])
    except FileFormatError:
        raise
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"The file's header has a wrong entry `{name}` ({type(error).__name__}: {error}); the "
            "file was edited, or written by another program."
        ) from error


def _optional(decode: Callable[[Any], T]) -> Callable[[Any], T | None]:
    return lambda value: None if value is None else decode(value)


# -- signature ------------------------------------------------------------------------------------


def _encode_signature(signature: Signature) -> dict[str, Any]:
    return {
        "in": _encode_form(signature.in_spec, "inputs"),
        "out": _encode_form(signature.out_spec, "outputs"),
        "inputs": [
            {
                "name": spec.name,
                "dtype": str(spec.dtype).removeprefix("torch."),
                "shape": list(spec.shape),
            }
            for spec in signature.inputs
        ],
    }


def _encode_form(spec: pytree.TreeSpec, what: str) -> Any:
    """Encode a pytree: "*" is a leaf; dicts keep their order, so they are lists of pairs."""

    def encode(value: Any) -> Any:
        if type(value) is int:
            return _LEAF
        if type(value) in (tuple, list):
            return {type(value).__name__: [encode(item) for item in value]}
        if type(value) is dict and all(type(key) is str for key in value):
            return {"dict": [[key, encode(item)] for key, item in value.items()]}
        raise FileFormatError(
            f"The engine cannot be saved: its {what} contain a {type(value).__name__}; files hold "
            "tuples, lists and dicts with string keys. Wrap the model to take and return those."
        )

    return encode(pytree.tree_unflatten(range(spec.num_leaves), spec))


def _decode_form(value: Any) -> Any:
    """Return a tree like the encoded one, with 0 for every leaf."""
    match value:
        case "*":
            return 0
        case {"tuple": list(items), **rest} if not rest:
            return tuple(_decode_form(item) for item in items)
        case {"list": list(items), **rest} if not rest:
            return [_decode_form(item) for item in items]
        case {"dict": list(pairs), **rest} if not rest:
            decoded = {_typed(key, str): _decode_form(item) for key, item in pairs}
            if len(decoded) == len(pairs):
                return decoded
    raise ValueError(f"{value!r:.100} is no form of inputs or outputs")


def _decode_signature(value: Any) -> Signature:
    form = _decode_form(value["in"])
    match form:
        case (tuple(), dict()):
            pass
        case _:
            raise ValueError("the form of the inputs must be (args, kwargs)")
    return Signature(
        in_spec=pytree.tree_structure(form),
        out_spec=pytree.tree_structure(_decode_form(value["out"])),
        inputs=tuple(_decode_input(entry) for entry in value["inputs"]),
    )


def _decode_input(entry: Mapping[str, Any]) -> InputSpec:
    sizes = entry["shape"]
    if not isinstance(sizes, list) or not sizes or sizes[0] is not None:
        raise ValueError(f"the shape {sizes!r:.100} must be a list that begins with null")
    for size in sizes[1:]:
        if not 0 <= _typed(size, int) < _SMALL:
            raise ValueError(f"the size {size} is out of range")
    dtype: torch.dtype = DTYPES[entry["dtype"]]
    return InputSpec(_typed(entry["name"], str), dtype, tuple(sizes))


# -- report, metadata, provenance, options --------------------------------------------------------


def _typed(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{value!r:.100} is no {wanted}")
    return value


_LAYER_TYPES = {
    **{"name": str, "kind": str, "reason": str},
    **{"packed": bool, "binary": bool, "binary_weight": bool, "by_choice": bool},
}


def _decode_report(value: Any) -> ConversionReport:
    for layer in value["layers"]:
        for key, entry in layer.items():
            if key == "shape":
                _integers(entry)
            else:
                _typed(entry, _LAYER_TYPES.get(key, int))
    _integers([value["bytes_before"], value["bytes_after"]])
    return ConversionReport.from_dict(value)


def _integers(values: Any) -> None:
    for value in _typed(values, list):
        _typed(value, int)


def _decode_metadata(value: Any) -> Metadata:
    _typed(value, dict)
    for key, kinds in (("mean", (int, float)), ("std", (int, float)), ("class_names", (str,))):
        for item in _typed(value.get(key) or [], list):
            _typed(item, *kinds)
    _integers(value.get("input_size") or [])
    if len(value.get("input_size") or [0, 0, 0]) != 3:
        raise ValueError("`input_size` must be three integers")
    return Metadata.from_dict(value)


def _decode_provenance(value: Any) -> Provenance:
    none = type(None)
    for key, kinds in (
        ("architecture", (str, none)),
        ("frequency", (int, float, none)),
        ("stage", (int, none)),
        ("licence", (str, none)),
    ):
        _typed(value.get(key), *kinds)
    return Provenance.from_dict(value)


def _decode_options(value: Any) -> dict[str, Any]:
    options: dict[str, Any] = _typed(value, dict)
    return options
