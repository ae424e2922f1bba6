"""Native steps of arithmetic and activations: functions of the numbers at each place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from biper_engine.graph.patterns import clamp_limits, only_user
from biper_engine.ops.cpu_program import Map
from biper_engine.runtime.placement import Placed, constant_of, dense_image, fills, without_gaps
from biper_engine.runtime.runs import RunMaps, Unsupported, leading

__all__ = ["HANDLERS", "apply", "number"]

Handler = Callable[[RunMaps, fx.Node, dict[str, Any]], None]


def number(value: float) -> Placed:
    """Return a number as an operand."""
    return constant_of(torch.tensor(float(value), dtype=torch.float64))


def apply(run: RunMaps, function: str, *operands: Placed) -> Placed:
    """Add a step that applies a function at each place of its operands, broadcast together.

    Args:
        run: the program.
        function: one of those of csrc/cpu/step_elementwise.cpp.
        operands: float values.

    Raises:
        Unsupported: the operands' images are not those of one batch.
    """
    if len(operands) == 1 and operands[0].shape is not None:
        (x,) = operands
        applied = apply(run, function, replace(x, shape=None, batch=0))
        return replace(applied, shape=x.shape, batch=x.batch)
    sizes = np.broadcast_shapes(*(x.sizes for x in operands))  # PyTorch's own loads SymPy
    for x in operands:
        new = len(sizes) - len(x.sizes)
        fits = (new == 0 and x.sizes[:1] == sizes[:1]) if x.batch == 0 else x.batch is None
        if not fits or (x.batch is None and new == 0 and x.sizes[:1] not in ((), (1,))):
            raise Unsupported("has operands that are not of one batch")
    placed = [run.settled(x) for x in operands]
    order = leading(placed, sizes)
    made = _emit(run, function, placed, sizes, order)
    return Placed(made, dense_image(sizes, order))


def _emit(
    run: RunMaps,
    function: str,
    operands: Sequence[Placed],
    sizes: Sequence[int],
    order: Sequence[int],
) -> Map:
    constants: list[Tensor] = []
    offsets: list[int] = []
    strides: list[int] = []
    for x in operands:
        wide = x.image.expand(tuple(sizes))
        offset = int(wide.storage_offset())
        if isinstance(x.source, Tensor):
            held, wide = _in_order(x.source, wide, order)
            offset = sum(map(len, constants))
            constants.append(held)
        offsets.append(offset)
        strides += [wide.stride(dim) if sizes[dim] > 1 else 0 for dim in order]
    (made,) = run.emit(
        "elementwise",
        function=function,
        maps=[-1 if isinstance(x.source, Tensor) else x.source for x in operands],
        constants=torch.cat(constants) if constants else None,
        sizes=[sizes[dim] for dim in order] or [1],
        strides=strides or [0] * len(operands),
        offsets=offsets,
    )
    return made


def _in_order(numbers: Tensor, image: Tensor, order: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return a constant's numbers, each once, in an order of its dimensions, and where they lie."""
    strides = [image.stride(dim) for dim in range(image.dim())]
    sizes = [size if stride else 1 for size, stride in zip(image.shape, strides, strict=True)]
    once = numbers.as_strided(sizes, strides, image.storage_offset())
    held = once.permute(tuple(order)).contiguous().flatten()
    return held, dense_image(sizes, order).expand(image.shape)


def _operand(run: RunMaps, value: Any) -> Placed:
    return run.numbers(value) if isinstance(value, fx.Node) else number(value)


# -- one operand -----------------------------------------------------------------------------------


def _unary(function: str) -> Handler:
    def handler(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
        run.set(node, apply(run, function, run.flowing(named["self"])))

    return handler


def _gelu(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    function = "gelu" if named["approximate"] == "none" else "gelu_tanh"
    run.set(node, apply(run, function, run.flowing(named["self"])))


_POWERS = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}


def _power(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, exponent = run.flowing(named["self"]), float(named["exponent"])
    if exponent == 1.0:
        run.set(node, x)
    elif exponent == 3.0:
        run.set(node, apply(run, "multiply", apply(run, "square", x), x))
    elif exponent in _POWERS:
        run.set(node, apply(run, _POWERS[exponent], x))
    else:
        raise Unsupported(f"has the exponent {exponent}")


def _identity(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    run.set(node, run.placed(named["self"]))


def _to_dtype(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x = run.numbers(named["self"])
    if named["dtype"] == torch.bool and not x.truth:
        x = apply(run, "not_equal", x, number(0.0))
    integers = x.integers if named["dtype"] in (None, x.integers) else None
    run.set(node, replace(x, truth=named["dtype"] == torch.bool, integers=integers))


# -- two operands ----------------------------------------------------------------------------------


def _binary(function: str) -> Handler:
    def handler(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
        a, b = _operand(run, named["self"]), _operand(run, named["other"])
        run.set(node, apply(run, function, a, b))

    return handler


def _add(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    a, b, alpha = _operand(run, named["self"]), _operand(run, named["other"]), named["alpha"]
    if alpha != 1:
        run.set(node, apply(run, "add_product", a, b, number(alpha)))
    elif _lie_alike(a, b):
        _sum(run, node, a, b)
    else:
        run.set(node, apply(run, "add", a, b))


def _sum(run: RunMaps, node: fx.Node, a: Placed, b: Placed) -> None:
    """Add two values that lie alike, and the clamp behind the sum."""
    behind = only_user(node)
    limits = None if behind is None else clamp_limits(behind)
    taken = () if behind is None or limits is None else (behind,)
    first, second = a.source, b.source
    assert isinstance(first, Map)
    assert isinstance(second, Map)
    other = run.seen(second, first.channels, first.height, first.width)
    (made,) = run.emit("sum", *taken, a=first, b=other, **_clamp_of(limits))
    run.set((node, *taken)[-1], replace(a, source=made))


def _lie_alike(*operands: Placed) -> bool:
    """Whether values are maps without gaps, the same places at the same strides."""
    first = operands[0]
    return all(
        isinstance(x.source, Map)
        and x.shape is None
        and fills(x)
        and without_gaps(x.image)
        and (x.image.shape, x.image.stride()) == (first.image.shape, first.image.stride())
        for x in operands
    )


def _subtract(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    a, b, alpha = _operand(run, named["self"]), _operand(run, named["other"]), named["alpha"]
    if alpha == 1:
        run.set(node, apply(run, "subtract", a, b))
    else:
        run.set(node, apply(run, "add_product", a, b, number(-alpha)))


def _reversed_subtract(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, other, alpha = run.flowing(named["self"]), number(named["other"]), named["alpha"]
    if alpha == 1:
        run.set(node, apply(run, "subtract", other, x))
    else:
        run.set(node, apply(run, "add_product", other, x, number(-alpha)))


def _divide_rounded(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    if named["rounding_mode"] is not None:
        raise Unsupported(f"has the rounding mode {named['rounding_mode']}")
    _binary("divide")(run, node, named)


def _compare(function: str, *, swapped: bool = False) -> Handler:
    def handler(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
        operands = [_operand(run, named["self"]), _operand(run, named["other"])]
        if operands[0].integers and not _is_exact(named["other"]):
            raise Unsupported("compares integers that floats may not hold")
        made = apply(run, function, *(reversed(operands) if swapped else operands))
        run.set(node, replace(made, truth=True))

    return handler


def _is_exact(value: Any) -> bool:
    """Whether every integer that differs from a number also does as a float32, on the same side."""
    return isinstance(value, int) and abs(value) < 2**24


def _prelu(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, slope = run.flowing(named["self"]), run.numbers(named["weight"])
    run.set(node, apply(run, "prelu", x, slope))


def _leaky_relu(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    slope = number(named["negative_slope"])
    run.set(node, apply(run, "prelu", run.flowing(named["self"]), slope))


def _elu(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, scale = run.flowing(named["self"]), named.get("scale", 1)
    if named.get("input_scale", 1) != 1 or ("scale" not in named and named["alpha"] != 1):
        raise Unsupported("scales its input")
    made = apply(run, "elu", x, number(named["alpha"]))
    run.set(node, made if scale == 1 else apply(run, "multiply", made, number(scale)))


def _softplus(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, beta, threshold = run.flowing(named["self"]), named["beta"], number(named["threshold"])
    scaled = x if beta == 1 else apply(run, "multiply", x, number(beta))
    made = apply(run, "softplus", scaled, threshold)
    run.set(node, made if beta == 1 else apply(run, "divide", made, number(beta)))


def _log_sigmoid(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    run.set(node, (apply(run, "log_sigmoid", run.flowing(named["self"])),))


def _glu(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x = run.settled(run.flowing(named["self"]))
    dim = named["dim"] % x.image.dim()
    if dim == 0:
        raise Unsupported("halves the batch")
    first, second = (x.viewed(part, 0) for part in x.image.chunk(2, dim))
    run.set(node, apply(run, "multiply", first, apply(run, "sigmoid", second)))


# -- three operands --------------------------------------------------------------------------------


def _where(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    chosen = [_operand(run, named[name]) for name in ("condition", "self", "other")]
    run.set(node, apply(run, "where", *chosen))


def _masked_fill(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, mask, value = (_operand(run, named[name]) for name in ("self", "mask", "value"))
    run.set(node, apply(run, "where", mask, value, x))


def _threshold(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x = run.flowing(named["self"])
    below = apply(run, "greater_equal", number(named["threshold"]), x)  # NaN is not below
    run.set(node, apply(run, "where", below, number(named["value"]), x))


def _add_product(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    a, b, c = (_operand(run, named[name]) for name in ("self", "tensor1", "tensor2"))
    if named["value"] != 1:
        b = apply(run, "multiply", b, number(named["value"]))
    run.set(node, apply(run, "add_product", a, b, c))


def _clamp(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, limits = run.flowing(named["self"]), clamp_limits(node)
    assert limits is not None
    inner = replace(x, shape=None, batch=0)
    if not _lie_alike(inner):
        run.set(node, apply(run, "clamp", x, *map(number, limits)))
        return
    (made,) = run.emit("sum", a=x.source, **_clamp_of(limits))
    run.set(node, replace(x, source=made))


def _clamp_of(limits: tuple[float, float] | None) -> dict[str, Any]:
    return {} if limits is None else dict(zip(("clamp_min", "clamp_max"), limits, strict=True))


def _limit(name: str, function: str) -> Handler:
    def handler(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
        operands = [_operand(run, named["self"]), _operand(run, named[name])]
        run.set(node, apply(run, function, *operands))

    return handler


def _clamp_tensors(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x = _operand(run, named["self"])
    for name, function in (("min", "maximum"), ("max", "minimum")):
        if named[name] is not None:
            x = apply(run, function, x, _operand(run, named[name]))
    run.set(node, x)


# -- BatchNorm -------------------------------------------------------------------------------------


def _batch_norm(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    """Normalise by statistics of the training: a factor and a shift for each channel."""
    x = run.flowing(named["input"])
    names = ("running_mean", "running_var", "weight", "bias")
    mean, variance, weight, bias = (
        None if named[name] is None else run.tensor(named[name]).double() for name in names
    )
    if mean is None or variance is None or named["training"] or len(x.sizes) < 2:
        raise Unsupported("takes its statistics from the batch")
    scale = (variance + named["eps"]).rsqrt() * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * scale
    ones = (1,) * (len(x.sizes) - 2)
    scale, shift = (constant_of(v.view(1, -1, *ones)) for v in (scale, shift))
    run.set(node, apply(run, "add_product", shift, x, scale))


_UNARY = {
    **{name: name for name in ("abs", "ceil", "erf", "exp", "floor", "reciprocal", "round")},
    **{name: name for name in ("log", "log1p", "mish")},
    **{name: name for name in ("rsqrt", "sigmoid", "sign", "silu", "sqrt", "tanh", "trunc")},
    **{"neg": "negative", "sgn": "sign", "hardswish": "hard_swish", "hardsigmoid": "hard_sigmoid"},
}

_COMPARISONS = {
    "greater": ("greater", False),
    "greater_equal": ("greater_equal", False),
    "less": ("greater", True),
    "less_equal": ("greater_equal", True),
    "equal": ("equal", False),
    "not_equal": ("not_equal", False),
}

HANDLERS: dict[str, Handler] = {
    **{name: _unary(function) for name, function in _UNARY.items()},
    "gelu": _gelu,
    "power": _power,
    "clone": _identity,
    "to_dtype": _to_dtype,
    **dict.fromkeys(("add", "add_number"), _add),
    **dict.fromkeys(("sub", "sub_number"), _subtract),
    **dict.fromkeys(("mul", "mul_number"), _binary("multiply")),
    **dict.fromkeys(("div", "div_number"), _binary("divide")),
    "div_rounded": _divide_rounded,
    "reversed_sub": _reversed_subtract,
    "maximum": _binary("maximum"),
    "minimum": _binary("minimum"),
    **{
        f"{name}{form}": _compare(function, swapped=swapped)
        for name, (function, swapped) in _COMPARISONS.items()
        for form in ("", "_tensor")
    },
    "prelu": _prelu,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "celu": _elu,
    "glu": _glu,
    "log_sigmoid": _log_sigmoid,
    "softplus": _softplus,
    "where": _where,
    "masked_fill": _masked_fill,
    "masked_fill_tensor": _masked_fill,
    "threshold": _threshold,
    "addcmul": _add_product,
    **dict.fromkeys(("hardtanh", "clamp", "relu"), _clamp),
    **dict.fromkeys(("clamp_min", "clamp_min_tensor"), _limit("min", "maximum")),
    **dict.fromkeys(("clamp_max", "clamp_max_tensor"), _limit("max", "minimum")),
    "clamp_tensor": _clamp_tensors,
    "batch_norm": _batch_norm,
}
"""The native steps of arithmetic, by the names of their declarations."""
