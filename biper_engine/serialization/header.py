"""The plain-data entries of a file's header: signature, report, metadata, provenance, options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from biper_engine.converted import ConvertedNetwork
from biper_engine.errors import FileFormatError
from biper_engine.graph import DTYPES
from biper_engine.graph.signature import InputSpec, Signature
from biper_engine.graph.structure import CONSTANT_TYPES, structure_of
from biper_engine.metadata import Metadata, Provenance
from biper_engine.report import ConversionReport
from biper_engine.serialization.forms import decode_form, encode_constant, encode_form

__all__ = ["header_entries", "header_values"]

T = TypeVar("T")

_MOST_SIZE = 1 << 31
_MOST = 1 << 62  # largest count; no network has as many operations
_MAX_RANK = 8
_MAX_INPUTS = 1024
_MAX_DEPTH = 32  # nesting of lists and objects in `options`


def header_entries(network: ConvertedNetwork) -> dict[str, Any]:
    """Return the header entries of a network, except for graph and proof.

    Raises:
        FileFormatError: inputs or outputs have a form that files cannot hold.
    """
    metadata, provenance = network.metadata, network.provenance
    return {
        "signature": _encode_signature(network.signature),
        "report": network.report.to_dict(),
        "metadata": None if metadata is None else metadata.to_dict(),
        "provenance": None if provenance is None else provenance.to_dict(),
        "options": dict(network.options),
    }


def header_values(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a network in a header, except for graph and proof.

    Raises:
        FileFormatError: an entry is missing or does not have the form of `header_entries`.
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
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"The file's header has a wrong entry `{name}` ({type(error).__name__}: "
            f"{error!s:.300}); the file was edited, or written by another program."
        ) from error


def _optional(decode: Callable[[Any], T]) -> Callable[[Any], T | None]:
    return lambda value: None if value is None else decode(value)


# -- signature ------------------------------------------------------------------------------------


def _encode_signature(signature: Signature) -> dict[str, Any]:
    return {
        "in": encode_form(signature.in_spec, "inputs"),
        "out": encode_form(signature.out_spec, "outputs"),
        "inputs": [
            {
                "name": spec.name,
                "dtype": str(spec.dtype).removeprefix("torch."),
                "shape": list(spec.shape),
            }
            for spec in signature.inputs
        ],
        "names": list(signature.names),
        "defaults": [[name, encode_constant(value)] for name, value in signature.defaults],
    }


def _decode_signature(value: Any) -> Signature:
    form = decode_form(value["in"])
    match form:
        case (tuple(), dict()) if type(form) is tuple:
            pass
        case _:
            raise ValueError("the form of the inputs must be (args, kwargs)")
    inputs = tuple(_decode_input(entry) for entry in _typed(value["inputs"], list))
    if not 1 <= len(inputs) <= _MAX_INPUTS:
        raise ValueError(f"a network takes 1 to {_MAX_INPUTS} tensors, not {len(inputs)}")
    return Signature(
        in_spec=structure_of(form),
        out_spec=structure_of(decode_form(value["out"])),
        inputs=inputs,
        names=tuple(_typed(name, str) for name in _typed(value.get("names", []), list)),
        defaults=tuple(
            (name, _constant(decode_form(default)))
            for name, default in _decode_defaults(value.get("defaults", []))
        ),
    )


def _decode_defaults(value: Any) -> list[tuple[str, Any]]:
    return [(_typed(name, str), default) for name, default in _typed(value, list)]


def _constant(value: Any) -> Any:
    return _typed(value, *CONSTANT_TYPES)


def _decode_input(entry: Mapping[str, Any]) -> InputSpec:
    sizes = entry["shape"]
    if not isinstance(sizes, list) or not sizes or sizes[0] is not None:
        raise ValueError(f"the shape {sizes!r:.100} must be a list that begins with null")
    if len(sizes) > _MAX_RANK:
        raise ValueError(f"the shape has {len(sizes)} sizes")
    for size in sizes[1:]:
        if not 0 <= _typed(size, int) < _MOST_SIZE:
            raise ValueError(f"the size {size!r:.100} is out of range")
    dtype: torch.dtype = DTYPES[_typed(entry["dtype"], str)]
    return InputSpec(_typed(entry["name"], str), dtype, tuple(sizes))


# -- report, metadata, provenance, options --------------------------------------------------------


def _typed(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{value!r:.100} is not of type {wanted}")
    return value


def _count(value: Any) -> int:
    if not 0 <= _typed(value, int) < _MOST:
        raise ValueError(f"{value!r:.100} is not a count")
    return int(value)


_LAYER_TYPES = {
    **{"name": str, "kind": str, "reason": str},
    **{"packed": bool, "binary": bool, "binary_weight": bool, "by_choice": bool},
    "weights_packed": bool,
}


def _decode_report(value: Any) -> ConversionReport:
    for layer in _typed(value["layers"], list):
        for key, entry in layer.items():
            if key == "shape":
                _counts(entry)
            elif key in _LAYER_TYPES:
                _typed(entry, _LAYER_TYPES[key])
            else:
                _count(entry)
    _counts([value["bytes_before"], value["bytes_after"]])
    return ConversionReport.from_dict(value)


def _counts(values: Any) -> None:
    for value in _typed(values, list):
        _count(value)


def _decode_metadata(value: Any) -> Metadata:
    _typed(value, dict)
    for key, kinds in (("mean", (int, float)), ("std", (int, float)), ("class_names", (str,))):
        for item in _typed(value.get(key) or [], list):
            _typed(item, *kinds)
    _typed(value.get("crop_pct", 1.0), int, float)
    _counts(value.get("input_size") or [])
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
        _typed(_typed(value, dict).get(key), *kinds)
    return Provenance.from_dict(value)


def _decode_options(value: Any) -> dict[str, Any]:
    options: dict[str, Any] = _typed(value, dict)
    _require_shallow(options, 0)
    return options


def _require_shallow(value: Any, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _require_shallow(item, depth + 1)
