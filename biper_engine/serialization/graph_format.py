"""A converted network's graph as JSON, with operator and argument names of our own.

A graph is a list of nodes in order of execution:

    {"input": name}                                       a tensor that the caller passes
    {"tensor": key, "name": name}                         a constant of the file
    {"op": operator, "name": name, "args": {...}}         a call; arguments by name
    {"item": index, "name": name, "of": name}             one result of a call that gives several
    {"output": [...]}                                     once, at the end

Operators are `biper.<name>` for the vocabulary and the keys of `FLOAT_OPS`; no ATen overload is
named. Values are JSON's own, and `{"node": name}`, `{"dtype": "float32"}`, and `{"float": "inf"}`
for what JSON cannot write.
"""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from biper_engine.errors import FileFormatError
from biper_engine.ops.float_ops import FLOAT_OPS
from biper_engine.ops.registration import SCHEMAS
from biper_engine.runtime import (
    PortableGraph,
    from_portable,
    named_arguments,
    output_values,
    to_portable,
)

__all__ = ["DTYPES", "decode", "encode", "operator_name"]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Layouts of a backend are made at load, so no file holds them.
_NOT_IN_FILES = ("prepack", "prepacked")

_MAX_DEPTH = 2  # of lists in an argument; none has more than one


def _biper_overload(name: str) -> OpOverload:
    overload: OpOverload = getattr(torch.ops.biper, name).default
    return overload


def _vocabulary() -> dict[str, tuple[OpOverload, tuple[str, ...]]]:
    """Return, by name in files, every operator with the argument names that files may hold."""
    table = {name: (op.target, op.arguments) for name, op in FLOAT_OPS.items()}
    for name in SCHEMAS:
        if name not in _NOT_IN_FILES:
            overload = _biper_overload(name)
            arguments = tuple(a.name for a in overload._schema.arguments)
            table[f"biper.{name}"] = (
                overload,
                tuple(a for a in arguments if a not in _NOT_IN_FILES),
            )
    return table


_VOCABULARY = _vocabulary()
_NAMES = {target: name for name, (target, _) in _VOCABULARY.items()}


def operator_name(node: fx.Node) -> str | None:
    """Return the name in files of the operator that a node calls, or None where it has none."""
    target = node.target
    return _NAMES.get(target) if isinstance(target, OpOverload) else None


# -- writing --------------------------------------------------------------------------------------


def encode(module: fx.GraphModule) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return a graph's JSON form and its tensors by the names that the JSON uses.

    Raises:
        FileFormatError: an operator, argument or value has no form in files; the message names it.
    """
    nodes: list[dict[str, Any]] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            nodes.append({"input": node.name})
        elif node.op == "get_attr":
            nodes.append({"tensor": node.target, "name": node.name})
        elif node.op == "output":
            values = [_encode_value(node, "output", v) for v in output_values(module.graph)]
            nodes.append({"output": values})
        elif node.target is operator.getitem:
            nodes.append({"item": node.args[1], "name": node.name, "of": node.args[0].name})
        else:
            nodes.append(_encode_call(node))
    constants = to_portable(module).constants
    for target, value in constants.items():
        if not isinstance(value, Tensor):
            raise FileFormatError(
                f"The engine cannot be saved: its constant {target!r} is {type(value)}, no tensor."
            )
    return nodes, constants


def _encode_call(node: fx.Node) -> dict[str, Any]:
    name = operator_name(node)
    if name is None:
        raise FileFormatError(
            f"The engine cannot be saved: node {node.name!r} calls {node.target}, which is not "
            "among the operators of .biper files. It runs all the same; write that part of the "
            "model with other operators, or keep it outside of what is converted."
        )
    overload, allowed = _VOCABULARY[name]
    defaults = {
        a.name: a.default_value for a in overload._schema.arguments if a.has_default_value()
    }
    arguments = {}
    for key, value in named_arguments(node).items():
        if key in allowed:
            arguments[key] = _encode_value(node, key, value)
        elif key not in defaults or value != defaults[key]:
            raise FileFormatError(
                f"The engine cannot be saved: node {node.name!r} passes `{key}` (={value}) to "
                f"{name}, but files hold {', '.join(allowed)} only."
            )
    return {"op": name, "name": node.name, "args": arguments}


def _encode_value(node: fx.Node, argument: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype) and value in _DTYPE_NAMES:
        return {"dtype": _DTYPE_NAMES[value]}
    if isinstance(value, list | tuple):
        return [_encode_value(node, argument, item) for item in value]
    raise FileFormatError(
        f"The engine cannot be saved: `{argument}` (={value!r}) of node {node.name!r} has no form "
        "in .biper files."
    )


# -- reading --------------------------------------------------------------------------------------


def decode(nodes: Any, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """Build the graph of `encode`'s JSON; nothing in it is trusted.

    Raises:
        FileFormatError: the message names the node and what is wrong with it.
    """
    if not isinstance(nodes, list) or not nodes:
        raise FileFormatError("The file's graph must be a list of nodes; the file was edited.")
    decoder = _Decoder(tensors)
    for position, entry in enumerate(nodes):
        decoder.add(entry, last=position == len(nodes) - 1)
    if not decoder.finished:
        raise FileFormatError("The file's graph has no output as its last node; it was edited.")
    unused = set(tensors) - set(decoder.constants)
    if unused:
        raise FileFormatError(
            f"The file has tensors that its graph does not use: {', '.join(sorted(unused)[:5])}."
        )
    try:
        module = from_portable(PortableGraph(tuple(decoder.nodes), decoder.constants))
    except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
        raise FileFormatError(f"The file's names cannot make a network: {error}.") from error
    _require_names(module, decoder.nodes)
    return module


class _Decoder:
    """Checks JSON nodes one by one and collects what `from_portable` takes."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.nodes: list[tuple[str, str, Any, Any, Any]] = []
        self.constants: dict[str, Tensor] = {}
        self.results: dict[str, Any] = {}
        self.finished = False

    def add(self, entry: Any, *, last: bool) -> None:
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
        if name in self.results:
            raise FileFormatError(f"Two nodes of the file's graph are called {name!r}.")
        add = {"input": self._input, "tensor": self._tensor, "op": self._call, "item": self._item}
        add[kind.pop()](name, entry)

    def _append(self, op: str, name: str, target: Any, args: Any = (), kwargs: Any = None) -> None:
        self.nodes.append((op, name, target, args, kwargs or {}))
        self.results[name] = target

    def _input(self, name: str, entry: Mapping[str, Any]) -> None:
        self._append("placeholder", name, name)

    def _tensor(self, name: str, entry: Mapping[str, Any]) -> None:
        key = entry["tensor"]
        if not isinstance(key, str) or key not in self.tensors:
            raise FileFormatError(f"Node {name!r} names the tensor {key!r}, which the file lacks.")
        for part in key.split("."):
            # Targets become Python source in `GraphModule`.
            if not part.isprintable() or not part or set(part) & set("\"'\\") or _reserved(part):
                raise FileFormatError(f"Tensor {key!r} of node {name!r} has a forbidden name.")
        self.constants[key] = self.tensors[key]
        self._append("get_attr", name, key)

    def _item(self, name: str, entry: Mapping[str, Any]) -> None:
        of, index = entry.get("of"), entry["item"]
        target = self.results.get(of) if isinstance(of, str) else None
        results = len(target._schema.returns) if isinstance(target, OpOverload) else 0
        if type(index) is not int or results < 2 or not 0 <= index < results:
            raise FileFormatError(
                f"Node {name!r} takes item {index!r} of {of!r}, which is no earlier call with that "
                "many results."
            )
        self._append("call_function", name, operator.getitem, (self._reference(name, of), index))

    def _call(self, name: str, entry: Mapping[str, Any]) -> None:
        op, arguments = entry["op"], entry.get("args")
        if not isinstance(op, str) or op not in _VOCABULARY:
            raise FileFormatError(
                f"Node {name!r} calls {op!r}, an operator that this version of biper_engine does "
                "not know; upgrade with `pip install -U biper-engine`, or save the file again."
            )
        overload, allowed = _VOCABULARY[op]
        if not isinstance(arguments, dict) or not set(arguments) <= set(allowed):
            raise FileFormatError(
                f"Node {name!r} has unknown arguments of {op}: {arguments!r:.200}; known are "
                f"{', '.join(allowed)}."
            )
        values = {key: self._value(name, value) for key, value in arguments.items()}
        args, kwargs = _by_position(overload, values)
        self._append("call_function", name, overload, args, kwargs)

    def _output(self, entry: Mapping[str, Any], last: bool) -> None:
        values = entry["output"]
        if not last or not isinstance(values, list):
            raise FileFormatError(
                "The file's graph must have one output, a list, as its last node."
            )
        self.finished = True
        decoded = tuple(self._value("output", value) for value in values)
        self.nodes.append(("output", "output", "output", (decoded,), {}))

    def _reference(self, node: str, name: Any) -> Any:
        if not isinstance(name, str) or name not in self.results:
            raise FileFormatError(
                f"Node {node!r} refers to {name!r}, which is no node before it; the file was "
                "edited."
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
            case {"float": "inf" | "-inf" | "nan" as number, **rest} if not rest:
                return float(number)
        raise FileFormatError(f"Node {node!r} has an unknown value: {value!r:.200}.")


def _by_position(
    overload: OpOverload, values: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split named arguments into positional and keyword ones, as conversion's graphs have them."""
    args: list[Any] = []
    kwargs = {}
    by_position = True
    for argument in overload._schema.arguments:
        by_position = by_position and not argument.kwarg_only and argument.name in values
        if by_position:
            args.append(values[argument.name])
        elif argument.name in values:
            kwargs[argument.name] = values[argument.name]
    return tuple(args), kwargs


def _reserved(name: str) -> bool:
    # Names become Python source, in a method of the GraphModule.
    return keyword.iskeyword(name) or name == "self"


def _node_name(name: Any) -> str:
    if (
        not isinstance(name, str)
        or not name.isascii()
        or not name.isidentifier()
        or _reserved(name)
    ):
        raise FileFormatError(f"{name!r} is no name for a node of the file's graph.")
    return name


def _require_names(module: fx.GraphModule, nodes: Sequence[tuple[Any, ...]]) -> None:
    for node, (_, name, *_) in zip(module.graph.nodes, nodes, strict=True):
        if node.name != name:
            raise FileFormatError(f"{name!r} is no name for a node of the file's graph.")
