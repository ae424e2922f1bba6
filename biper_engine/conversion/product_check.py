"""Check a product of two activations: its integer sums are those of the model's own values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from biper_engine.conversion.activation_products import ActivationProduct, FactorValue

__all__ = ["expected_sums"]


def expected_sums(
    product: ActivationProduct, values: Mapping[str, Any], height: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return what a product must be for the model's values, each as the map [N, V, H, M].

    Args:
        product: the product.
        values: values of the float graph by name.
        height: number of matrices of an image, H.

    Returns:
        The integer sums, exact zeros of a sign counted as 1; the sums that such zeros reach, or
        None if there are none; and the model's own result.
    """
    left, left_zeros = _elements(product.left, values)
    right, right_zeros = _elements(product.right, values)
    sums = (left @ right).round().to(torch.int32)
    result = values[product.result]
    reached = None
    if bool(left_zeros.any()) or bool(right_zeros.any()):
        reached = left_zeros.any(-1, keepdim=True) | right_zeros.any(-2, keepdim=True)
        reached = _as_map(reached.expand(sums.shape), height)
    return _as_map(sums, height), reached, _as_map(result, height)


def _elements(factor: FactorValue, values: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the elements of a factor in float64, and where the model has a third value."""
    value = values[factor.value].double()
    rule = factor.rule
    middle = (rule.high + rule.low) / 2
    zero = torch.zeros_like(value, dtype=torch.bool)
    if rule.tie:
        zero = (value - middle).abs() < (rule.high - rule.low) / 4
        if factor.source is not None:
            shape = [1] * value.dim()
            shape[factor.summed] = -1
            zero = zero | (values[factor.source] == rule.threshold.view(shape).to(value.device))
    elements = torch.where(zero | (value >= middle), 1.0, float(factor.low)).to(value)
    return elements, zero


def _as_map(matrices: Tensor, height: int) -> Tensor:
    """Return matrices [..., M, V] as the map [N, V, H, M]."""
    rows, columns = matrices.shape[-2:]
    return matrices.reshape(-1, height, rows, columns).permute(0, 3, 1, 2)
