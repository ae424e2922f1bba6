"""A converted network's graph as JSON, with our own names of operators and arguments.

A graph is a list of nodes in order of execution:

    {"input": name}                                       a tensor that the caller passes
    {"tensor": key, "name": name}                         a constant of the file
    {"op": operator, "name": name, "args": {...}}         a call; arguments by name
    {"item": index, "name": name, "of": name}             one result of a call that gives several
    {"output": [...]}                                     once, at the end

Operators are those of `biper_engine.graph`, which declares their arguments; ATen overloads are not
named. Values are JSON values, `{"node": name}`, `{"dtype": "float32"}`, `{"layout": "contiguous"}`,
and `{"float": "inf"}` for floats that JSON cannot write.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.errors import FileFormatError
from biper_engine.graph import DTYPES, MisfitError, Operator, operator_of
from biper_engine.graph.portable import to_portable
from biper_engine.graph.reading import output_values

__all__ = ["LAYOUTS", "encode"]

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "preserve": torch.preserve_format,
}
_LAYOUT_NAMES = {layout: name for name, layout in LAYOUTS.items()}


def encode(module: fx.GraphModule) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return a graph's JSON form, and its tensors by their names in the JSON.

    Raises:
        FileFormatError: files cannot hold an operator, argument or value; the message names it.
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
                f"The engine cannot be saved: constant {target!r} is {type(value)}, not a tensor."
            )
    return nodes, constants


def _encode_call(node: fx.Node) -> dict[str, Any]:
    declared = operator_of(node)
    if declared is None:
        raise FileFormatError(
            f"The engine cannot be saved: node {node.name!r} calls {node.target}, which is not "
            "among the operators of .biper files. The engine still runs; write that part of the "
            "model with other operators, or keep it outside the converted model."
        )
    try:
        named = declared.named(node)
    except MisfitError as error:
        raise FileFormatError(
            f"The engine cannot be saved: node {node.name!r}: {error}."
        ) from error
    arguments = {
        key: _encode_value(node, key, value)
        for key, value in named.items()
        if _is_held(declared, node, key, value)
    }
    return {"op": declared.name, "name": node.name, "args": arguments}


def _is_held(declared: Operator, node: fx.Node, key: str, value: Any) -> bool:
    """Whether a file holds an argument; False if leaving it out means the same.

    Raises:
        FileFormatError: a file cannot hold it.
    """
    if key in declared.arguments:
        return True
    defaults = declared.defaults
    if declared.is_elsewhere(key, value) or (key in defaults and value == defaults[key]):
        return False
    raise FileFormatError(
        f"The engine cannot be saved: node {node.name!r} passes `{key}` (={value}) to "
        f"{declared.name}, but files hold {', '.join(declared.arguments)} only."
    )


def _encode_value(node: fx.Node, argument: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype) and value in _DTYPE_NAMES:
        return {"dtype": _DTYPE_NAMES[value]}
    if isinstance(value, torch.memory_format) and value in _LAYOUT_NAMES:
        return {"layout": _LAYOUT_NAMES[value]}
    if isinstance(value, list | tuple):
        return [_encode_value(node, argument, item) for item in value]
    raise FileFormatError(
        f"The engine cannot be saved: `{argument}` (={value!r}) of node {node.name!r} has no form "
        "in .biper files."
    )
