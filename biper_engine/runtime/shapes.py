"""Shapes of the values in a graph, found without computing anything.

PyTorch's own rules for tensors without data are Python for most operators, and the first of them to
be used imports SymPy and Dynamo: 1 to 3 seconds for what takes milliseconds. So the operators that
networks mostly consist of have a rule here, for their ordinary arguments; a rule that cannot tell
says nothing, and then PyTorch's is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.errors import GeometryError
from biper_engine.geometry import Conv2dGeometry, pool_positions
from biper_engine.runtime.graph import get_constant, with_defaults
from biper_engine.runtime.signature import InputSpec

__all__ = ["BATCH", "MISFITS", "call_without_data", "values_without_data", "without_data"]

_aten = torch.ops.aten
_ARITHMETIC = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor)

BATCH = 61
"""Images of the tensors without data that stand for values; no other size of a network is likely
to be this one, so that a first dimension of it is the batch."""

MISFITS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(MemoryError, RuntimeError, TypeError, ValueError),
)
"""What torch raises where arguments do not fit an operator, or where it has no rule for the result
or one that needs values; a fake of ours raises GeometryError."""


def without_data(value: Any) -> Any:
    """Return a tensor without its data, and any other value as it is."""
    return value.to("meta") if isinstance(value, Tensor) else value


def call_without_data(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call an operator on tensors without data."""
    rule = _RULES.get(target)
    if rule is not None:
        first, *rest = with_defaults(target, args, kwargs).values()
        x = first[0] if isinstance(first, (list, tuple)) and first else first
        dtype = _result_dtype(target, x, rest)
        shape = rule(first, *rest) if dtype is not None else None
        if shape is not None:
            return torch.empty(shape, dtype=dtype, device="meta")
    return target(*args, **kwargs)


def values_without_data(module: fx.GraphModule, inputs: Sequence[InputSpec]) -> dict[fx.Node, Any]:
    """Return the value of every node for BATCH images as a tensor without data.

    It is None where its shape depends on data, or PyTorch has no rule for it.
    """
    values: dict[fx.Node, Any] = {}
    specs = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            spec = next(specs)
            sizes = [BATCH if size is None else size for size in spec.shape]
            values[node] = torch.empty(sizes, dtype=spec.dtype, device="meta")
        elif node.op == "get_attr":
            values[node] = without_data(get_constant(module, str(node.target)))
        elif node.op == "call_function":
            values[node] = _result_without_data(node, values)
    return values


def _result_without_data(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if any(values[source] is None for source in node.all_input_nodes):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    try:
        return call_without_data(node.target, args, kwargs)
    except MISFITS:
        return None


def _result_dtype(target: Any, x: Any, rest: Sequence[Any]) -> torch.dtype | None:
    """Return the dtype of a rule's result; None where the rule does not hold."""
    if not isinstance(x, Tensor):
        return None
    if x.is_floating_point():
        return x.dtype
    if target not in _ARITHMETIC or not isinstance(rest[0], (int, float)):
        return None
    dtype = torch.result_type(x, rest[0])  # images that are bytes, and a number
    is_true_division = target is _aten.div.Tensor and not dtype.is_floating_point
    return torch.get_default_dtype() if is_true_division else dtype


# -- rules: the shape of the result, or None where only PyTorch can tell ---------------------------

_Shape = tuple[int, ...] | None


def _is_like(value: Any, x: Tensor, *shape: int) -> bool:
    return isinstance(value, Tensor) and value.dtype == x.dtype and value.shape == shape


def _elementwise(x: Tensor, *numbers: Any) -> _Shape:
    plain = all(isinstance(number, (int, float)) for number in numbers)
    return tuple(x.shape) if plain else None


def _with_scalar_or_smaller(x: Tensor, other: Any, alpha: Any = 1) -> _Shape:
    if alpha != 1:
        return None
    if isinstance(other, Tensor):
        fits = other.dtype == x.dtype and other.dim() <= x.dim()
        ends = x.shape[x.dim() - other.dim() :] if fits else ()
        fits = fits and all(b in (1, a) for a, b in zip(ends, other.shape, strict=True))
    else:
        fits = isinstance(other, (int, float))
    return tuple(x.shape) if fits else None


def _cat(tensors: Sequence[Any], dim: Any) -> _Shape:
    x = tensors[0]
    if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        return None
    rest = [size for axis, size in enumerate(x.shape) if axis != dim % x.dim()]
    total = 0
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.dim()) != (x.dtype, x.dim()):
            return None
        if [size for axis, size in enumerate(tensor.shape) if axis != dim % x.dim()] != rest:
            return None
        total += tensor.shape[dim]
    rest.insert(dim % x.dim(), total)
    return tuple(rest)


def _conv2d(
    x: Tensor, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> _Shape:
    if x.dim() != 4 or not isinstance(weight, Tensor) or weight.dim() != 4:
        return None
    if weight.dtype != x.dtype or not (bias is None or _is_like(bias, x, len(weight))):
        return None
    try:
        geometry = Conv2dGeometry(
            in_channels=weight.shape[1] * groups,
            out_channels=weight.shape[0],
            kernel_size=(weight.shape[2], weight.shape[3]),
            stride=stride,
            padding=(*padding[:1] * 2, *padding[1:] * 2),
            dilation=dilation,
            groups=groups,
        )
        size = geometry.output_size(x.shape[2], x.shape[3])
    except (GeometryError, TypeError):
        return None
    fits = geometry.in_channels == x.shape[1]
    return (x.shape[0], geometry.out_channels, *size) if fits else None


def _linear(x: Tensor, weight: Any, bias: Any) -> _Shape:
    if x.dim() < 2 or not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    fits = _is_like(weight, x, len(weight), x.shape[-1])
    if not fits or not (bias is None or _is_like(bias, x, len(weight))):
        return None
    return (*x.shape[:-1], len(weight))


def _batch_norm(x: Tensor, *rest: Any) -> _Shape:
    channels = x.shape[1] if x.dim() >= 2 else 0
    *parameters, training = rest[:5]
    fits = all(_is_like(parameter, x, channels) for parameter in parameters)
    return tuple(x.shape) if fits and training is False else None


def _max_pool2d(
    x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any
) -> _Shape:
    ones = list(dilation) in ([1], [1, 1]) if isinstance(dilation, (list, tuple)) else False
    return _pool2d(x, kernel, stride, padding, ceil_mode) if ones else None


def _avg_pool2d(
    x: Tensor, kernel: Any, stride: Any, padding: Any, ceil_mode: Any, *rest: Any
) -> _Shape:
    return _pool2d(x, kernel, stride, padding, ceil_mode) if rest[-1] is None else None


def _pool2d(x: Tensor, kernel: Any, stride: Any, padding: Any, ceil_mode: Any) -> _Shape:
    if x.dim() != 4 or 0 in x.shape:
        return None
    sizes = []
    for axis, length in enumerate(x.shape[2:]):
        try:
            sides = (kernel, stride or kernel, padding)
            k, s, p = (side[-1] if axis else side[0] for side in sides)
        except (IndexError, TypeError):
            return None
        if not all(isinstance(v, int) for v in (k, s, p)) or k < 1 or s < 1 or not 0 <= 2 * p <= k:
            return None
        sizes.append(pool_positions(length, k, s, p, bool(ceil_mode)))
    return (*x.shape[:2], *sizes) if min(sizes) > 0 else None


def _mean(x: Tensor, dims: Any, keepdim: Any, dtype: Any) -> _Shape:
    ok = isinstance(dims, (list, tuple)) and all(isinstance(d, int) for d in dims) and dims
    if not ok or dtype is not None or not all(-x.dim() <= d < x.dim() for d in dims):
        return None
    gone = {d % x.dim() for d in dims}
    if len(gone) < len(dims):
        return None
    return tuple(
        1 if d in gone else size for d, size in enumerate(x.shape) if keepdim or d not in gone
    )


def _adaptive_avg_pool2d(x: Tensor, size: Any) -> _Shape:
    ok = isinstance(size, (list, tuple)) and len(size) == 2 and x.dim() == 4 and 0 not in x.shape
    return (*x.shape[:2], *size) if ok and all(isinstance(s, int) and s > 0 for s in size) else None


_RULES: dict[Any, Callable[..., _Shape]] = {
    **dict.fromkeys(
        (
            *(_aten.hardtanh.default, _aten.clamp.default, _aten.relu.default),
            *(_aten.leaky_relu.default, _aten.silu.default, _aten.hardswish.default),
            *(_aten.sigmoid.default, _aten.tanh.default),
            *(_aten.sign.default, _aten.abs.default, _aten.neg.default),
        ),
        _elementwise,
    ),
    **dict.fromkeys(
        (
            *_ARITHMETIC,
            _aten._prelu_kernel.default,
        ),
        _with_scalar_or_smaller,
    ),
    _aten.cat.default: _cat,
    _aten.conv2d.default: _conv2d,
    _aten.linear.default: _linear,
    _aten.batch_norm.default: _batch_norm,
    _aten.max_pool2d.default: _max_pool2d,
    _aten.avg_pool2d.default: _avg_pool2d,
    _aten.mean.dim: _mean,
    _aten._adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
}
