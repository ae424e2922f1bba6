"""Rebuild the graph of a file without trusting anything in it.

Every node is checked against the declaration of its operator, with the values of the nodes before
it, for any number of images; see `biper_engine.graph`. The graph is only built after all checks.
"""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload

from biper_engine.errors import FileFormatError
from biper_engine.graph import (
    DTYPES,
    OPERATORS,
    ImagesSize,
    MisfitError,
    Result,
    Value,
    input_value,
)
from biper_engine.graph.portable import PortableGraph, from_portable
from biper_engine.graph.signature import InputSpec
from biper_engine.serialization.graph_format import LAYOUTS

__all__ = ["decode"]

_MAX_NODES = 1 << 16
_MAX_NAME = 1000
_MAX_PARTS = 32  # parts of a tensor's name, each of which becomes a module
_MAX_DEPTH = 1  # nesting of lists in an argument
# Attributes of a module cannot be names of its tensors.
_TAKEN = frozenset(dir(fx.GraphModule({}, fx.Graph())))


def decode(
    nodes: Any, tensors: Mapping[str, Tensor], inputs: Sequence[InputSpec]
) -> fx.GraphModule:
    """Build the graph from the JSON of `encode`.

    Args:
        nodes: the header's entry.
        tensors: tensors of the file, by name.
        inputs: the network's inputs.

    Raises:
        FileFormatError: the message names the node and what is wrong with it.
    """
    if not isinstance(nodes, list) or not nodes:
        raise FileFormatError("The file's graph must be a list of nodes; the file was edited.")
    if len(nodes) > _MAX_NODES:
        raise FileFormatError(
            f"The file's graph has {len(nodes):,} nodes; this version reads up to {_MAX_NODES:,}."
        )
    decoder = _Decoder(tensors, inputs)
    for position, entry in enumerate(nodes):
        decoder.add(entry, last=position == len(nodes) - 1)
    decoder.require_complete()
    try:
        module = from_portable(PortableGraph(tuple(decoder.nodes), decoder.constants))
    except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
        raise FileFormatError(f"The file's names cannot make a network: {error}.") from error
    _require_names(module, decoder.nodes)
    return module


class _Decoder:
    """Checks JSON nodes one by one and collects the arguments of `from_portable`."""

    def __init__(self, tensors: Mapping[str, Tensor], inputs: Sequence[InputSpec]) -> None:
        self.tensors = tensors
        self.nodes: list[tuple[str, str, Any, Any, Any]] = []
        self.constants: dict[str, Tensor] = {}
        self._inputs = inputs
        self._taken = 0
        self._results: dict[str, Result] = {}
        self._finished = False

    def add(self, entry: Any, *, last: bool) -> None:
        """Check one node and append it."""
        kinds = {"input", "tensor", "op", "item", "output"}
        kind = kinds & set(entry) if isinstance(entry, dict) else set()
        if len(kind) != 1:
            raise FileFormatError(
                f"Node {len(self.nodes)} of the file's graph must have one of {sorted(kinds)}; the "
                "file was edited."
            )
        if kind == {"output"}:
            self._output(entry, last)
            return
        name = _node_name(entry["input"] if kind == {"input"} else entry.get("name"))
        if name in self._results:
            raise FileFormatError(f"Two nodes of the file's graph are called {name!r}.")
        add = {"input": self._input, "tensor": self._tensor, "op": self._call, "item": self._item}
        add[kind.pop()](name, entry)

    def require_complete(self) -> None:
        """Require an output, every input and every tensor of the file."""
        if not self._finished:
            raise FileFormatError("The file's graph has no output as its last node; it was edited.")
        if self._taken != len(self._inputs):
            raise FileFormatError(
                f"The file's graph and signature disagree: {self._taken} and {len(self._inputs)} "
                "inputs; it was edited."
            )
        unused = set(self.tensors) - set(self.constants)
        if unused:
            names = ", ".join(f"{name:.100}" for name in sorted(unused)[:5])
            raise FileFormatError(f"The file has tensors that its graph does not use: {names}.")

    def _append(
        self, op: str, name: str, target: Any, result: Result, args: Any = (), kwargs: Any = None
    ) -> None:
        self.nodes.append((op, name, target, args, kwargs or {}))
        self._results[name] = result

    def _input(self, name: str, entry: Mapping[str, Any]) -> None:
        spec = self._inputs[self._taken] if self._taken < len(self._inputs) else None
        if spec is None or spec.name != name:
            raise FileFormatError(
                f"The file's graph and signature disagree: input {self._taken} is {name!r} in the "
                f"graph; it was edited."
            )
        self._taken += 1
        try:
            self._append("placeholder", name, name, input_value(spec))
        except MisfitError as error:
            raise FileFormatError(
                f"The file's input {name!r} has an impossible shape: {error}."
            ) from error

    def _tensor(self, name: str, entry: Mapping[str, Any]) -> None:
        key = entry["tensor"]
        if not isinstance(key, str) or key not in self.tensors:
            raise FileFormatError(
                f"Node {name!r} names the tensor {key!r:.100}, which the file lacks."
            )
        if not _is_tensor_name(key):
            raise FileFormatError(f"Tensor {key!r:.100} of node {name!r} has a forbidden name.")
        self.constants[key] = self.tensors[key]
        try:
            self._append("get_attr", name, key, Value.of_constant(self.tensors[key]))
        except MisfitError as error:
            raise FileFormatError(f"Tensor {key!r:.100} is too large: {error}.") from error

    def _item(self, name: str, entry: Mapping[str, Any]) -> None:
        of, index = entry.get("of"), entry["item"]
        several = self._results.get(of) if isinstance(of, str) else None
        if (
            type(index) is not int
            or not isinstance(several, tuple)
            or not 0 <= index < len(several)
        ):
            raise FileFormatError(
                f"Node {name!r} takes item {index!r:.100} of {of!r:.100}, which is not an earlier "
                "call with that many results."
            )
        arguments = (self._reference(name, of), index)
        self._append("call_function", name, operator.getitem, several[index], arguments)

    def _call(self, name: str, entry: Mapping[str, Any]) -> None:
        op, arguments = entry["op"], entry.get("args")
        declared = OPERATORS.get(op) if isinstance(op, str) else None
        if declared is None:
            raise FileFormatError(
                f"Node {name!r} calls {op!r:.100}, an operator that this version of biper_engine "
                "does not know; upgrade with `pip install -U biper-engine`, or save the file again."
            )
        if not isinstance(arguments, dict) or not set(arguments) <= set(declared.arguments):
            raise FileFormatError(
                f"Node {name!r} has unknown arguments of {op}: {arguments!r:.200}; known are "
                f"{', '.join(declared.arguments)}."
            )
        values = {key: self._value(name, value) for key, value in arguments.items()}
        try:
            result = declared.infer({key: self._known(value) for key, value in values.items()})
        except MisfitError as error:
            raise FileFormatError(
                f"Node {name!r} ({op}) does not fit its arguments: {error!s:.400}."
            ) from error
        args, kwargs = _by_position(declared.target, values)
        self._append("call_function", name, declared.target, result, args, kwargs)

    def _known(self, value: Any) -> Any:
        """Return what is known about a node or a list's items, or any other value itself."""
        if isinstance(value, list):
            return [self._known(item) for item in value]
        return self._results[value.name] if isinstance(value, _REFERENCE) else value

    def _output(self, entry: Mapping[str, Any], last: bool) -> None:
        values = entry["output"]
        if not last or not isinstance(values, list):
            raise FileFormatError(
                "The file's graph must have one output, a list, as its last node."
            )
        self._finished = True
        decoded = tuple(self._output_value(value) for value in values)
        self.nodes.append(("output", "output", "output", (decoded,), {}))

    def _output_value(self, value: Any) -> Any:
        decoded = self._value("output", value)
        known = self._known(decoded)
        if isinstance(known, tuple | list):
            raise FileFormatError("The file's graph returns several results as one value.")
        if known is not None and not isinstance(
            known, Value | ImagesSize | bool | int | float | str
        ):
            raise FileFormatError(f"The file's graph returns {value!r:.100}, which is not a value.")
        return decoded

    def _reference(self, node: str, name: Any) -> Any:
        if not isinstance(name, str) or name not in self._results:
            raise FileFormatError(
                f"Node {node!r} refers to {name!r:.100}, which is not a node before it; the file "
                "was edited."
            )
        return PortableGraph.reference(name)

    def _value(self, node: str, value: Any, depth: int = 0) -> Any:
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        if isinstance(value, list) and depth < _MAX_DEPTH:
            return [self._value(node, item, depth + 1) for item in value]
        match value:
            case {"node": name, **rest} if not rest:
                return self._reference(node, name)
            case {"dtype": str(name), **rest} if name in DTYPES and not rest:
                return DTYPES[name]
            case {"layout": str(name), **rest} if name in LAYOUTS and not rest:
                return LAYOUTS[name]
            case {"float": "inf" | "-inf" | "nan" as number, **rest} if not rest:
                return float(number)
        raise FileFormatError(f"Node {node!r} has an unknown value: {value!r:.200}.")


_REFERENCE = type(PortableGraph.reference(""))


def _by_position(target: Any, values: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split named arguments into positional and keyword ones, as in conversion's graphs."""
    if not isinstance(target, OpOverload):  # a Python function
        return tuple(values[name] for name in sorted(values)), {}
    args: list[Any] = []
    kwargs = {}
    by_position = True
    for argument in target._schema.arguments:
        by_position = by_position and not argument.kwarg_only and argument.name in values
        if by_position:
            args.append(values[argument.name])
        elif argument.name in values:
            kwargs[argument.name] = values[argument.name]
    return tuple(args), kwargs


# -- names ----------------------------------------------------------------------------------------


def _reserved(name: str) -> bool:
    # Names become Python source, in a method of the GraphModule.
    return keyword.iskeyword(name) or name == "self"


def _is_tensor_name(key: str) -> bool:
    parts = key.split(".")
    return len(key) <= _MAX_NAME and len(parts) <= _MAX_PARTS and all(map(_is_attribute, parts))


def _is_attribute(part: str) -> bool:
    """Whether a module may have a tensor or a module with this name."""
    written = part.isprintable() and bool(part) and not set(part) & set("\"'\\")
    free = not keyword.iskeyword(part) and part not in _TAKEN and not part.startswith("__")
    return written and free


def _node_name(name: Any) -> str:
    if (
        not isinstance(name, str)
        or len(name) > _MAX_NAME
        or not name.isascii()
        or not name.isidentifier()
        or _reserved(name)
    ):
        raise FileFormatError(f"{name!r:.100} is not a name for a node of the file's graph.")
    return name


def _require_names(module: fx.GraphModule, nodes: Sequence[tuple[Any, ...]]) -> None:
    for node, (_, name, *_) in zip(module.graph.nodes, nodes, strict=True):
        if node.name != name:
            raise FileFormatError(f"{name!r:.100} is not a name for a node of the file's graph.")
