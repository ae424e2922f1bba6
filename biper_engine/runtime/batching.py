"""Whether the images of a batch go through a network without meeting.

Then rows may be added to a batch and left out of its results, and nothing else changes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from biper_engine.ops.float_ops import FLOAT_OPS
from biper_engine.runtime.graph import biper_op, output_values
from biper_engine.runtime.patterns import all_arguments
from biper_engine.runtime.shapes import BATCH, values_without_data
from biper_engine.runtime.signature import InputSpec

__all__ = ["images_are_independent"]

_FLOWING = {"x", "bits", "residual"}  # of our own operators


def images_are_independent(module: fx.GraphModule, inputs: Sequence[InputSpec] | None) -> bool:
    """Whether every result is a batch, of which a row depends on that row of the inputs alone.

    False where that is not known: for operators outside of the closed list, and for values whose
    first dimension is another than the batch.

    Args:
        module: a converted network.
        inputs: what it takes; None where that is not known.
    """
    if not inputs or any(spec.shape[:1] != (None,) for spec in inputs):
        return False
    values = values_without_data(module, inputs)
    returned = output_values(module.graph)
    return all(isinstance(x, fx.Node) and x.op != "get_attr" for x in returned) and all(
        _is_batch(values[node]) and _keeps_rows(node, values)
        for node in module.graph.nodes
        if node.op == "call_function"
    )


def _is_batch(value: Any) -> bool:
    results = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == BATCH for x in results)


def _keeps_rows(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    if node.target is operator.getitem:
        return True
    op = biper_op(node)
    target: Any = node.target
    rule = _RULES.get(target)
    if op is None and rule is None:
        return False
    named = all_arguments(node)
    if op is not None:  # parameters that are computed may have been computed from several images
        return all(
            name in _FLOWING or not isinstance(value, fx.Node) or value.op == "get_attr"
            for name, value in named.items()
        )
    operands = {name: _operand(value, values) for name, value in named.items()}
    assert rule is not None
    return rule(operands, values[node])


class _Batch:
    """A value that flows, of some rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank


def _operand(value: Any, values: dict[fx.Node, Any]) -> Any:
    """Return what an argument is: a _Batch, a constant tensor without data, or any other value."""
    if isinstance(value, (list, tuple)):
        return [_operand(item, values) for item in value]
    if not isinstance(value, fx.Node):
        return value
    return values[value] if value.op == "get_attr" else _Batch(values[value].dim())


# -- rules: from what an operator takes, and its result, to whether rows stay apart ----------------

_Rule = Callable[[dict[str, Any], Tensor], bool]


def _elementwise(named: dict[str, Any], result: Tensor) -> bool:
    """Require flowing values of one rank, and constants that are the same for every row."""
    for value in named.values():
        if isinstance(value, _Batch) and value.rank != result.dim():
            return False
        if isinstance(value, Tensor) and value.dim() == result.dim() and value.shape[0] != 1:
            return False
        if isinstance(value, Tensor) and value.dim() > result.dim():
            return False
    return True


def _first_flows(named: dict[str, Any], result: Tensor) -> bool:
    first, *rest = named.values()
    return isinstance(first, _Batch) and not any(isinstance(value, _Batch) for value in rest)


def _image(named: dict[str, Any], result: Tensor) -> bool:
    first = next(iter(named.values()))
    return _first_flows(named, result) and first.rank == 4


def _batch_norm(named: dict[str, Any], result: Tensor) -> bool:
    return _first_flows(named, result) and named["training"] is False


def _layer_norm(named: dict[str, Any], result: Tensor) -> bool:
    return _first_flows(named, result) and len(named["normalized_shape"]) < result.dim()


def _linear(named: dict[str, Any], result: Tensor) -> bool:
    first = next(iter(named.values()))
    return _first_flows(named, result) and first.rank >= 2


def _over_dims(named: dict[str, Any], result: Tensor) -> bool:
    """Require dimensions, none of which is the first."""
    first, dims = next(iter(named.values())), named["dim"]
    listed = dims if isinstance(dims, list) else [dims]
    ranked = isinstance(first, _Batch) and bool(listed)
    return ranked and all(isinstance(d, int) and d % first.rank != 0 for d in listed)


def _cat(named: dict[str, Any], result: Tensor) -> bool:
    tensors, dim = named["tensors"], named["dim"]
    return all(isinstance(x, _Batch) for x in tensors) and dim % result.dim() != 0


def _unsqueeze(named: dict[str, Any], result: Tensor) -> bool:
    return isinstance(named["self"], _Batch) and named["dim"] % result.dim() != 0


def _reshape(named: dict[str, Any], result: Tensor) -> bool:
    """Require [-1, ...]; rows stay rows where both shapes begin with the batch."""
    return isinstance(named["self"], _Batch) and list(named["shape"][:1]) == [-1]


def _permute(named: dict[str, Any], result: Tensor) -> bool:
    return isinstance(named["self"], _Batch) and named["dims"][0] % result.dim() == 0


def _expand(named: dict[str, Any], result: Tensor) -> bool:
    x = named["self"]
    return isinstance(x, _Batch) and x.rank == len(named["size"]) and named["size"][0] == -1


def _pad(named: dict[str, Any], result: Tensor) -> bool:
    return isinstance(named["self"], _Batch) and len(named["pad"]) < 2 * result.dim()


def _both_flow(named: dict[str, Any], result: Tensor) -> bool:
    return all(isinstance(value, _Batch) for value in named.values())


_BY_NAME: dict[_Rule, str] = {
    _elementwise: "add sub mul div maximum minimum reciprocal rsqrt sqrt exp log abs neg sign sin "
    "cos round floor power hardtanh clamp relu prelu leaky_relu elu gelu silu hardswish "
    "hardsigmoid sigmoid tanh where greater_equal greater less_equal less equal to_dtype clone",
    _image: "conv2d convolution max_pool2d avg_pool2d adaptive_avg_pool2d upsample_nearest2d "
    "upsample_bilinear2d",
    _linear: "linear matmul",
    _batch_norm: "batch_norm",
    _layer_norm: "layer_norm",
    _over_dims: "mean sum amax variance softmax log_softmax squeeze slice select",
    _cat: "cat",
    _unsqueeze: "unsqueeze",
    _reshape: "reshape",
    _permute: "permute",
    _expand: "expand",
    _pad: "pad",
    _both_flow: "batch_matmul",
}
_RULES = {
    FLOAT_OPS[name].target: rule for rule, names in _BY_NAME.items() for name in names.split()
}
