"""Float convolutions in one to three dimensions, also transposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import BOOL, COUNT, TENSOR, integers, optional
from biper_engine.graph.operator import Operator
from biper_engine.graph.sizes import ImagesSize, MisfitError, divided
from biper_engine.graph.values import FLOATS, Value, require, same_dtype

__all__ = ["OPERATORS", "fixed_sizes", "per_axis"]

_aten = torch.ops.aten

_PER_AXIS = (1, 2, 3)


def fixed_sizes(x: Value, count: int, name: str) -> tuple[int, ...]:
    """Return the last sizes of a value, which must be at least 1 and the same for every batch."""
    require(x.rank >= count, f"`{name}` (={x}) must have {count} dimensions or more")
    sizes = x.shape[x.rank - count :]
    for size in sizes:
        if not isinstance(size, int) or size < 1:
            raise MisfitError(f"`{name}` (={x}) has no fixed size that is at least 1")
    return sizes  # type: ignore[return-value]


def per_axis(values: Sequence[int], count: int, name: str) -> tuple[int, ...]:
    """Return one integer for each axis; a single one counts for all axes."""
    require(len(values) in (1, count), f"`{name}` (={list(values)}) for {count} axes")
    return tuple(values) * count if len(values) == 1 else tuple(values)


def _convolution(
    input: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Value:
    same_dtype(FLOATS, input=input, weight=weight, bias=bias)
    count = weight.rank - 2
    require(
        count in _PER_AXIS and input.rank == count + 2, f"`weight` is {weight}, `input` {input}"
    )
    channels, *images = fixed_sizes(input, count + 1, "input")
    first, second, *kernel = fixed_sizes(weight, count + 2, "weight")
    inputs, outputs = (first, second * groups) if transposed else (second * groups, first)
    fits = channels == inputs
    require(fits, f"`weight` (={weight}) with {groups} groups takes {inputs} channels of `input`")
    divided(outputs, groups)
    divided(inputs, groups)
    require(bias is None or bias.shape == (outputs,), f"`bias` must be [{outputs}], is {bias}")
    steps, pads = per_axis(stride, count, "stride"), per_axis(padding, count, "padding")
    gaps = per_axis(dilation, count, "dilation")
    extra = per_axis(output_padding, count, "output_padding") if transposed else (0,) * count
    sizes = []
    for at in range(count):
        reach = gaps[at] * (kernel[at] - 1) + 1
        if transposed:
            fits = extra[at] < max(steps[at], gaps[at])
            require(fits, f"`output_padding` (={list(extra)}) must be below `stride` or `dilation`")
            size = (images[at] - 1) * steps[at] - 2 * pads[at] + reach + extra[at]
        else:
            require(images[at] + 2 * pads[at] >= reach, f"a kernel of {kernel} in {input}")
            size = (images[at] + 2 * pads[at] - reach) // steps[at] + 1
        require(size >= 1, f"nothing is left of `input` (={input})")
        sizes.append(size)
    return input.like(_batch_of(input), outputs, *sizes)


def _batch_of(x: Value) -> Any:
    batch = x.shape[0]
    require(isinstance(batch, ImagesSize) or batch >= 1, f"`input` (={x}) is empty")
    return batch


def _conv2d(
    input: Value,
    weight: Value,
    bias: Value | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Value:
    require(weight.rank == 4, f"`weight` must have 4 dimensions, but it is {weight}")
    return _convolution(input, weight, bias, stride, padding, dilation, False, [0], groups)


_CONV = {
    "input": TENSOR,
    "weight": TENSOR,
    "bias": optional(TENSOR),
    "stride": integers(_PER_AXIS, 1),
    "padding": integers(_PER_AXIS, 0),
    "dilation": integers(_PER_AXIS, 1),
}

OPERATORS: list[Operator] = [
    Operator(
        name="conv2d",
        target=_aten.conv2d.default,
        arguments={**_CONV, "groups": COUNT},
        result=_conv2d,
        rows=rows.image,
    ),
    Operator(
        name="convolution",
        target=_aten.convolution.default,
        arguments={
            **_CONV,
            "transposed": BOOL,
            "output_padding": integers(_PER_AXIS, 0),
            "groups": COUNT,
        },
        result=_convolution,
        rows=rows.image,
    ),
]
