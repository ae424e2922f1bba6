"""Schemas and shape functions of the operators that only plans have; see `biper_engine.ops.stem`.

They are registered like the others, but have a separate table: files may only have the operators
in `registration.SCHEMAS`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biper_engine.errors import GeometryError
from biper_engine.geometry import Pool2dGeometry
from biper_engine.ops import backends, checks
from biper_engine.ops.registration import empty_map, empty_packed, register
from biper_engine.ops.stem import Stem

__all__ = ["PLAN_SCHEMAS", "split_stem"]

_STEM = (
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? threshold=None, Tensor? sense=None, *, "
    "ScalarType dtype=float, int[2] stride=1, int[4] padding=0, int[2] pool_kernel_size=1, "
    "int[2] pool_stride=1, int[2] pool_padding=0, float? clamp_min=None, float? clamp_max=None, "
    "Tensor? scale=None, Tensor? offset=None)"
)

PLAN_SCHEMAS = {
    "stem": f"{_STEM} -> (Tensor, Tensor)",
    "stem_bits": f"{_STEM} -> Tensor",
    "pooled_linear": "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
}

_TENSORS = ("bias", "threshold", "sense", "scale", "offset")


def split_stem(
    weight: Tensor, options: dict[str, Any], *, want_float: bool, want_bits: bool
) -> Stem:
    """Return the stem of an operator's flat arguments, except for `x`.

    Raises:
        GeometryError: `weight` does not have four dimensions, or a pool value is out of range.
    """
    if weight.dim() != 4:
        raise GeometryError(
            f"`weight` must be [O, C, KH, KW], but its shape is {tuple(weight.shape)}."
        )
    pool = Pool2dGeometry(
        kernel_size=tuple(options.get("pool_kernel_size", (1, 1))),
        stride=tuple(options.get("pool_stride", (1, 1))),
        padding=tuple(options.get("pool_padding", (0, 0))),
    )
    return Stem(
        weight=weight,
        stride=tuple(options.get("stride", (1, 1))),
        padding=tuple(options.get("padding", (0, 0, 0, 0))),
        pool=pool,
        clamp_min=options.get("clamp_min"),
        clamp_max=options.get("clamp_max"),
        compute_dtype=options.get("dtype", torch.float32),
        want_float=want_float,
        want_bits=want_bits,
        **{name: options.get(name) for name in _TENSORS},
    )


# -- stem -----------------------------------------------------------------------------------------


def _split(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any], want_float: bool
) -> tuple[Stem, tuple[int, int, int, int]]:
    """Return the checked stem and the output's logical shape [N, O, OH, OW]."""
    options = {**options, "bias": bias}
    stem = split_stem(weight, options, want_float=want_float, want_bits=True)
    return stem, checks.check_stem(x, stem)


def _stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    sense: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor | None, Tensor | None]:
    options |= {"threshold": threshold, "sense": sense}
    stem, _ = _split(x, weight, bias, options, True)
    return backends.select("stem", None, x.device).stem(x, stem)


def _stem_bits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    sense: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    options |= {"threshold": threshold, "sense": sense}
    stem, _ = _split(x, weight, bias, options, False)
    return backends.select("stem_bits", None, x.device).stem(x, stem)[1]


def _stem_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    sense: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    options |= {"threshold": threshold, "sense": sense}
    stem, shape = _split(x, weight, bias, options, True)
    return empty_map(x, shape, stem.compute_dtype), empty_packed(x, shape)


def _stem_bits_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    sense: Tensor | None = None,
    **options: Any,
) -> Tensor:
    options |= {"threshold": threshold, "sense": sense}
    return empty_packed(x, _split(x, weight, bias, options, False)[1])


# -- pooled linear --------------------------------------------------------------------------------


def _pooled_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    checks.check_pooled_linear(x, weight, bias)
    return backends.select("pooled_linear", None, x.device).pooled_linear(x, weight, bias)


def _pooled_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    checks.check_pooled_linear(x, weight, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


register("stem", PLAN_SCHEMAS["stem"], _stem, _stem_fake)
register("stem_bits", PLAN_SCHEMAS["stem_bits"], _stem_bits, _stem_bits_fake)
register("pooled_linear", PLAN_SCHEMAS["pooled_linear"], _pooled_linear, _pooled_linear_fake)
