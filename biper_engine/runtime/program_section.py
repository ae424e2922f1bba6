"""A network's native program as JSON values and tensors, from which it can be made without Python.

    {"version": 2, "steps": [...], "inputs": [...], "outputs": [...]}

or, for a network that is not one program, `{"version": 2, "reason": text}`. The steps are what was
added to the program, in order:

    {"map": [height, width, channels, packed]}          a new map
    {"view": map, "as": [height, width, channels, packed]}
    {"step": kind, "args": {...}}                        writes the next maps

Maps are numbers, counted in the order in which they come to be. Arguments are JSON values,
`{"float": "inf"}` for floats that JSON cannot write, and `{"tensor": name}` for the values of a
tensor of the file, in the order of its dimensions; with `sizes`, `strides` and `offset`, counted in
values, for a view of it. With `low`, `high` and `channels` besides, the tensor is packed weights
and the view one of what `biper::unpack_weight` makes of them. An input or output has a `name`, the
`map`, the tensor's `sizes` for one image, and `channels_last`, which says how its values lie; an
input also says whether its values may be `planar` instead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.converted import ProgramSection
from biper_engine.errors import BackendUnavailableError
from biper_engine.graph.memory import isolate_outputs
from biper_engine.graph.reading import arguments, biper_op, constant
from biper_engine.graph.signature import Signature
from biper_engine.graph.structure import Leaf, marked_structure
from biper_engine.ops.backends import use_backend
from biper_engine.ops.cpu_program import Form
from biper_engine.ops.recorded_program import AddedMap, AddedStep, AddedView, RecordedProgram
from biper_engine.runtime.native import native_plan

__all__ = ["program_section"]

_VERSION = 2


def program_section(
    module: fx.GraphModule, signature: Signature, constants: Mapping[str, Tensor], prefix: str
) -> ProgramSection:
    """Return the native program of a network.

    Args:
        module: a converted network on the CPU.
        signature: how it is called.
        constants: its tensors by their names in the file, each contiguous in memory of its own.
        prefix: with which the names of other tensors begin.
    """
    if not constants:
        return _without("it has no tensors, and runs operator by operator")
    isolate_outputs(module)
    try:
        with use_backend("cpu"):
            plan = native_plan(module, torch.device("cpu"), signature.inputs, RecordedProgram)
    except BackendUnavailableError as error:
        return _without(str(error))
    if isinstance(plan, str) or plan.reasons or len(plan.runs) != 1:
        return _without(str(plan))
    if not plan.is_whole:
        return _without(
            "it leaves an input out, returns one as it is, or returns a tensor several times"
        )
    program = plan.runs[0].program
    assert isinstance(program, RecordedProgram)
    writer = _Writer(constants, _unpacked(module), prefix)
    if any(form.integers for form, _ in program.sources):
        return _without("the C library takes no inputs of integers")
    entry = {
        "version": _VERSION,
        "steps": [writer.added(each) for each in program.added],
        "inputs": [
            {**_form(form, spec.name), "planar": planar and form.channels_last}
            for (form, planar), spec in zip(program.sources, signature.inputs, strict=True)
        ],
        "outputs": [
            _form(form, name)
            for form, name in zip(program.results, _output_names(signature), strict=True)
        ],
    }
    return ProgramSection(entry, writer.tensors)


def _without(reason: str) -> ProgramSection:
    return ProgramSection({"version": _VERSION, "reason": reason}, {})


def _form(form: Form, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "map": form.map.index,
        "sizes": list(form.sizes),
        "channels_last": form.channels_last,
    }


def _output_names(signature: Signature) -> list[str]:
    """Return a name for each output: where it is in what a call returns."""
    found = [".".join(path) for path in _paths(marked_structure(signature.out_spec), ())]
    count = signature.out_spec.num_leaves
    return [name or "output" for name in found] if len(found) == count else _numbered(count)


def _numbered(count: int) -> list[str]:
    return [str(position) for position in range(count)]


def _paths(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the path to each tensor in a structure, in the order of its leaves."""
    if isinstance(value, Leaf):
        yield path
    for key, item in _items(value):
        yield from _paths(item, (*path, str(key)))


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, tuple | list):
        return zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return [(name, getattr(value, name)) for name in names]
    return ()


class _Writer:
    """Writes what was added to a program."""

    def __init__(
        self,
        constants: Mapping[str, Tensor],
        unpacked: Mapping[bytes, dict[str, Any]],
        prefix: str,
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._prefix = prefix
        self._unpacked = unpacked
        self._constants = {
            tensor.untyped_storage().data_ptr(): (name, tensor)
            for name, tensor in constants.items()
            if tensor.numel()
        }
        self._written: dict[tuple[Any, ...], str] = {}

    def added(self, each: AddedMap | AddedView | AddedStep) -> dict[str, Any]:
        if isinstance(each, AddedMap):
            return {"map": list(each.shape)}
        if isinstance(each, AddedView):
            return {"view": each.map, "as": list(each.shape)}
        return {
            "step": each.step,
            "args": {name: self._value(value) for name, value in each.arguments.items()},
        }

    def _value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        return value

    def _tensor(self, tensor: Tensor) -> dict[str, Any]:
        name, constant = self._constants.get(tensor.untyped_storage().data_ptr(), ("", tensor))
        unpacked = self._unpacked.get(_storage_bytes(tensor)) if not name else None
        if unpacked is not None:
            return {**unpacked, **_view(tensor)}
        if not name or constant.dtype != tensor.dtype or not 0 < tensor.numel() <= constant.numel():
            return {"tensor": self._new(tensor)}
        if tensor.is_contiguous() and tensor.numel() == constant.numel():
            return {"tensor": name}
        return {"tensor": name, **_view(tensor)}

    def _new(self, tensor: Tensor) -> str:
        """Return the name of a tensor that the file gets beside the constants, one for equals."""
        plain = tensor.detach().contiguous().clone()
        key = (plain.dtype, plain.shape, _storage_bytes(plain))
        if key not in self._written:
            self._written[key] = f"{self._prefix}{len(self._written)}"
            self.tensors[self._written[key]] = plain
        return self._written[key]


def _view(tensor: Tensor) -> dict[str, Any]:
    return {
        "sizes": list(tensor.shape),
        "strides": list(tensor.stride()),
        "offset": int(tensor.storage_offset()),
    }


def _storage_bytes(tensor: Tensor) -> bytes:
    """Return all bytes that a tensor may be a view of."""
    values = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return bytes(values.numpy())


def _unpacked(module: fx.GraphModule) -> dict[bytes, dict[str, Any]]:
    """Return how to make each unpacked weight of a graph from its constants, by its bytes."""
    found: dict[bytes, dict[str, Any]] = {}
    for node in module.graph.nodes:
        if biper_op(node) != "unpack_weight":
            continue
        named = arguments(node)
        tensors = {name: constant(module, named[name]) for name in ("weight", "low", "high")}
        if None in tensors.values() or named["dtype"] != torch.float32:
            continue
        made = torch.ops.biper.unpack_weight(
            *tensors.values(), channels=named["channels"], dtype=torch.float32
        )
        weight, low, high = (str(named[name].target) for name in tensors)
        found[_storage_bytes(made)] = {
            **{"tensor": weight, "low": low, "high": high},
            "channels": named["channels"],
        }
    return found
