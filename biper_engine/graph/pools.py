"""Pools, resizing, and windows of float maps as columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from biper_engine.geometry import pool_positions
from biper_engine.graph import rows
from biper_engine.graph.arguments import BOOL, TENSOR, Kind, integers, number, optional
from biper_engine.graph.convolutions import fixed_sizes, per_axis
from biper_engine.graph.operator import Numbers, Operator, Rule, passing
from biper_engine.graph.sizes import ImagesSize, divided
from biper_engine.graph.values import FLOATS, Value, require, require_dtype

__all__ = ["OPERATORS"]

_aten = torch.ops.aten

_Sizes = Sequence[int]


def _require_map(x: Value, count: int, name: str = "self") -> tuple[int, ...]:
    """Require a float map with a batch and `count` axes; return its sizes along them."""
    require_dtype(name, x, FLOATS)
    require(x.rank == count + 2, f"`{name}` must have {count + 2} dimensions, but it is {x}")
    require(isinstance(x.shape[0], ImagesSize) or x.shape[0] >= 1, f"`{name}` (={x}) is empty")
    return fixed_sizes(x, count + 1, name)[1:]


def _windows(
    x: Value,
    kernel: _Sizes,
    stride: _Sizes,
    padding: _Sizes,
    ceil_mode: bool,
    count: int,
    dilation: _Sizes = (1,),
) -> list[int]:
    """Return the number of windows along each axis."""
    kernels, gaps = per_axis(kernel, count, "kernel_size"), per_axis(dilation, count, "dilation")
    steps = per_axis(stride or kernels, count, "stride")
    pads = per_axis(padding, count, "padding")
    found = []
    for at, size in enumerate(_require_map(x, count)):
        reach = gaps[at] * (kernels[at] - 1) + 1
        fits = 2 * pads[at] <= kernels[at]
        require(fits, f"`padding` (={list(padding)}) must be at most half of `kernel_size`")
        require(size + 2 * pads[at] >= reach, f"a window of {list(kernel)} in `self` (={x})")
        found.append(pool_positions(size, reach, steps[at], pads[at], ceil_mode))
        require(found[-1] >= 1, f"no window of {list(kernel)} in `self` (={x})")
    return found


def _max_pool(count: int) -> Rule:
    def rule(
        self: Value,
        kernel_size: _Sizes,
        stride: _Sizes,
        padding: _Sizes,
        dilation: _Sizes,
        ceil_mode: bool,
    ) -> Value:
        sizes = _windows(self, kernel_size, stride, padding, ceil_mode, count, dilation)
        return self.like(*self.shape[:2], *sizes)

    return rule


def _with_positions(rule: Rule, count: int) -> Rule:
    """Return the rule of a max pool that also returns the position of each maximum."""

    def both(self: Value, **options: Any) -> tuple[Value, ...]:
        pooled = rule(self=self, **options)
        assert isinstance(pooled, Value)
        values = 1
        for size in fixed_sizes(self, count, "self"):
            values *= size
        return pooled, Value(torch.int64, pooled.shape, limits=(0, values - 1))

    return both


def _avg_pool(count: int) -> Rule:
    # PyTorch has no 3-d average pool in half precision on the CPU.
    dtypes = FLOATS if count == 2 else (torch.float32, torch.float64)

    def rule(
        self: Value,
        kernel_size: _Sizes,
        stride: _Sizes,
        padding: _Sizes,
        ceil_mode: bool,
        **options: Any,
    ) -> Value:
        require_dtype("self", self, dtypes)
        sizes = _windows(self, kernel_size, stride, padding, ceil_mode, count)
        return self.like(*self.shape[:2], *sizes)

    return rule


def _adaptive(count: int) -> Rule:
    def rule(self: Value, output_size: _Sizes) -> Value:
        _require_map(self, count)
        return self.like(*self.shape[:2], *output_size)

    return rule


# -- resizing --------------------------------------------------------------------------------------


def _scaled(input: Value, output_size: Any, scale_factors: Any, count: int) -> list[int]:
    sizes = _require_map(input, count, "input")
    given = (output_size is None) != (scale_factors is None)
    require(given, "one of `output_size` and `scale_factors` must be given")
    if output_size is not None:
        return list(per_axis(output_size, count, "output_size"))
    require(len(scale_factors) == count, f"`scale_factors` (={list(scale_factors)})")
    found = [int(size * float(factor)) for size, factor in zip(sizes, scale_factors, strict=True)]
    require(min(found) >= 1, f"nothing is left of `input` (={input})")
    return found


def _upsample(count: int) -> Rule:
    def rule(input: Value, output_size: Any, scale_factors: Any, **options: Any) -> Value:
        return input.like(*input.shape[:2], *_scaled(input, output_size, scale_factors, count))

    return rule


def _upsamples(kinds: str, **corners: Kind) -> list[Operator]:
    return [
        _operator(
            f"upsample_{kind}",
            getattr(_aten, f"upsample_{kind}").vec,
            {
                "input": TENSOR,
                "output_size": optional(integers((int(kind[-2]),), 1)),
                **corners,
                "scale_factors": optional(_FACTORS),
            },
            _upsample(int(kind[-2])),
        )
        for kind in kinds.split()
    ]


def _smooth(
    self: Value,
    output_size: _Sizes,
    align_corners: bool,
    scales_h: float | None,
    scales_w: float | None,
) -> Value:
    require_dtype("self", self, FLOATS[:1])
    sizes = _require_map(self, 2)
    for size, wanted, scale in zip(sizes, output_size, (scales_h, scales_w), strict=True):
        # PyTorch looks up places by the scale, without a check against the sizes.
        fits = scale is None or int(size * scale) == wanted
        require(fits, f"`output_size` (={list(output_size)}) of {self}, scaled by {scale}")
    return self.like(*self.shape[:2], *output_size)


# -- windows as columns ----------------------------------------------------------------------------


def _positions(
    sizes: _Sizes, kernel: _Sizes, dilation: _Sizes, padding: _Sizes, stride: _Sizes
) -> int:
    total = 1
    for at, size in enumerate(sizes):
        reach = dilation[at] * (kernel[at] - 1) + 1
        require(size + 2 * padding[at] >= reach, f"a window of {list(kernel)} in {list(sizes)}")
        total *= (size + 2 * padding[at] - reach) // stride[at] + 1
    return total


def _columns(
    self: Value, kernel_size: _Sizes, dilation: _Sizes, padding: _Sizes, stride: _Sizes
) -> Value:
    _require_map(self, 2)
    channels, height, width = fixed_sizes(self, 3, "self")
    count = _positions((height, width), kernel_size, dilation, padding, stride)
    return self.like(self.shape[0], channels * kernel_size[0] * kernel_size[1], count)


def _from_columns(
    self: Value,
    output_size: _Sizes,
    kernel_size: _Sizes,
    dilation: _Sizes,
    padding: _Sizes,
    stride: _Sizes,
) -> Value:
    _require_map(self, 1)
    depth, count = fixed_sizes(self, 2, "self")
    fits = count == _positions(output_size, kernel_size, dilation, padding, stride)
    require(fits, f"`self` (={self}) does not match `output_size` (={list(output_size)})")
    channels = divided(depth, kernel_size[0] * kernel_size[1])
    return self.like(self.shape[0], channels, *output_size)


_FACTORS = Kind(
    "1 to 3 numbers from 0 to 4096",
    lambda v: (
        isinstance(v, list | tuple)
        and len(v) in (1, 2, 3)
        and all(number(0, 4096).accepts(item) for item in v)
    ),
)
_PAIR, _PAIR_FROM_0 = integers((2,), 1), integers((2,), 0)
_DIVISOR = Kind("an integer other than 0", lambda v: type(v) is int and 0 < abs(v) < 1 << 31)


def _window(count: int) -> dict[str, Kind]:
    lengths = (1, count)
    return {
        "self": TENSOR,
        "kernel_size": integers(lengths, 1),
        "stride": integers((0, *lengths), 1),
        "padding": integers(lengths, 0),
    }


def _max_arguments(count: int) -> dict[str, Kind]:
    return {**_window(count), "dilation": integers((1, count), 1), "ceil_mode": BOOL}


def _avg_arguments(count: int) -> dict[str, Kind]:
    more = {"ceil_mode": BOOL, "count_include_pad": BOOL, "divisor_override": optional(_DIVISOR)}
    return {**_window(count), **more}


def _operator(name: str, target: Any, arguments: dict[str, Kind], result: Rule) -> Operator:
    return Operator(name=name, target=target, arguments=arguments, result=result, rows=rows.image)


_UNFOLD = {
    **dict.fromkeys(("kernel_size", "dilation"), _PAIR),
    **{"padding": _PAIR_FROM_0, "stride": _PAIR},
}

OPERATORS: list[Operator] = [
    *passing(
        Numbers.LARGEST,
        [_operator("max_pool2d", _aten.max_pool2d.default, _max_arguments(2), _max_pool(2))],
    ),
    *passing(Numbers.MOVED, _upsamples("nearest1d nearest2d nearest3d")),
    *[
        _operator(
            f"max_pool{count}d_positions",
            getattr(_aten, f"max_pool{count}d_with_indices").default,
            _max_arguments(count),
            _with_positions(_max_pool(count), count),
        )
        for count in (2, 3)
    ],
    _operator("avg_pool2d", _aten.avg_pool2d.default, _avg_arguments(2), _avg_pool(2)),
    _operator("avg_pool3d", _aten.avg_pool3d.default, _avg_arguments(3), _avg_pool(3)),
    *[
        _operator(
            f"adaptive_avg_pool{count}d",
            getattr(_aten, f"_adaptive_avg_pool{count}d").default,
            {"self": TENSOR, "output_size": integers((count,), 1)},
            _adaptive(count),
        )
        for count in (2, 3)
    ],
    *[
        _operator(
            f"adaptive_max_pool{count}d_positions",
            getattr(_aten, f"adaptive_max_pool{count}d").default,
            {"self": TENSOR, "output_size": integers((count,), 1)},
            _with_positions(_adaptive(count), count),
        )
        for count in (2, 3)
    ],
    *_upsamples("linear1d bilinear2d bicubic2d trilinear3d", align_corners=BOOL),
    *[
        _operator(
            f"upsample_{kind}_smooth",
            getattr(_aten, f"_upsample_{kind}_aa").default,
            {
                "self": TENSOR,
                "output_size": integers((2,), 1),
                "align_corners": BOOL,
                **dict.fromkeys(("scales_h", "scales_w"), optional(number(0, 4096))),
            },
            _smooth,
        )
        for kind in ("bilinear2d", "bicubic2d")
    ],
    _operator("unfold_columns", _aten.im2col.default, {"self": TENSOR, **_UNFOLD}, _columns),
    _operator(
        "fold_columns",
        _aten.col2im.default,
        {"self": TENSOR, "output_size": _PAIR, **_UNFOLD},
        _from_columns,
    ),
]
