"""Shapes of the values in a graph, found without computing anything.

PyTorch's rules for tensors without data are Python for most operators, and the first use of one
imports SymPy and Dynamo: 1 to 3 seconds for what takes milliseconds. So the shapes of declared
operators come from their declarations (`operators`); PyTorch's rules are used for other operators,
and for arguments that a declaration does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.errors import GeometryError
from biper_engine.graph.operator import Operator
from biper_engine.graph.operators import operator_for
from biper_engine.graph.reading import get_constant, with_defaults
from biper_engine.graph.signature import InputSpec
from biper_engine.graph.sizes import MisfitError
from biper_engine.graph.values import Value

__all__ = [
    "BATCH",
    "call_without_data",
    "input_without_data",
    "result_without_data",
    "values_without_data",
    "without_data",
]

BATCH = 61
"""Batch size of the tensors without data that stand for values. No other size of a network is
likely to be equal, so a first dimension of this size is the batch."""

_REFUSALS = (RuntimeError, IndexError, AssertionError, ZeroDivisionError, GeometryError)
"""Errors of a call without data that may succeed with data.

PyTorch's operators raise RuntimeError if they have no rule, if the shape depends on values or
if it does not fit BATCH images, IndexError for a position beyond these, and AssertionError if
a check of a Python rule fails. Functions on sizes divide by zero. Operators of
`torch.ops.biper` raise GeometryError.
"""


def without_data(value: Any) -> Any:
    """Return a tensor without its data, and any other value as it is."""
    return value.to("meta") if isinstance(value, Tensor) else value


def input_without_data(spec: InputSpec) -> Tensor:
    """Return BATCH images of an input as a tensor without data."""
    sizes = [BATCH if size is None else size for size in spec.shape]
    return torch.empty(sizes, dtype=spec.dtype, device="meta")


def call_without_data(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call an operator on tensors without data.

    Raises:
        MisfitError: the shape of the result depends on values, or the arguments do not fit.
    """
    declared = operator_for(target)
    if declared is not None:
        try:
            return _inferred(declared, args, kwargs)
        except MisfitError:
            pass  # PyTorch's rule finds the shape, or the error
    try:
        return target(*args, **kwargs)
    except _REFUSALS as error:
        raise MisfitError(str(error)) from error


def result_without_data(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """Return the result of a call for BATCH images as a tensor without data.

    Args:
        node: the call.
        value_of: returns the values of its inputs, without data; None if one is not known.

    Returns:
        None if the shape is not known before it is computed.
    """
    if any(value_of(source) is None for source in node.all_input_nodes):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    try:
        return call_without_data(node.target, args, kwargs)
    except MisfitError:
        return None


def _inferred(declared: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    target = declared.target
    if not isinstance(target, torch._ops.OpOverload):
        raise MisfitError("a function on sizes")
    named = with_defaults(target, args, kwargs)
    defaults = declared.defaults
    given = {
        name: _described(value)
        for name, value in named.items()
        if name in declared.arguments or not (name in defaults and value == defaults[name])
    }
    return _blank(declared.infer(given))


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Value(value.dtype, tuple(value.shape))
    return [_described(item) for item in value] if isinstance(value, (list, tuple)) else value


def _blank(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(_blank, result))
    if not isinstance(result, Value):
        return result
    shape: Any = result.shape  # integers, like those of the operands
    return torch.empty(shape, dtype=result.dtype, device="meta")


def values_without_data(module: fx.GraphModule, inputs: Sequence[InputSpec]) -> dict[fx.Node, Any]:
    """Return the value of every node for BATCH images as a tensor without data.

    A value is None if its shape is not known before it is computed.
    """
    values: dict[fx.Node, Any] = {}
    specs = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = input_without_data(next(specs))
        elif node.op == "get_attr":
            values[node] = without_data(get_constant(module, str(node.target)))
        elif node.op == "call_function":
            values[node] = result_without_data(node, values.__getitem__)
    return values
