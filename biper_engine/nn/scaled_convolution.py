"""A convolution and its learned scale as one function, whose gradients cost no pass over its maps.

With y = conv(x, w) + b and z = alpha * y, per output channel, and g = dL/dz:

    dL/dx     = convolution backward of g with alpha * w
    dL/dw     = alpha * G, with G the gradient of w for g
    dL/db     = alpha * B, with B the sum of g
    dL/dalpha = sum(g * y) = sum(w * G) + b * B

since y is linear in w and b. Of the maps only x is kept, not y, and g is read by the convolution
alone. The product, the sum and the second map that autograd makes of `y * alpha` are not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["scaled_conv2d"]


def scaled_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Return exactly `F.conv2d(x, weight, bias, stride, padding, dilation, groups) * alpha`.

    Args:
        x: [N, C, H, W].
        weight: [O, C / groups, KH, KW].
        bias: [O] or None.
        alpha: [O, 1, 1].
        stride: of rows and columns.
        padding: the same, in numbers.
        dilation: the same.
        groups: as F.conv2d.
    """
    result: Tensor = _ScaledConv2d.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, alpha, stride, padding, dilation, groups
    )
    return result


class _ScaledConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor, *geometry: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, alpha)
        ctx.geometry = geometry
        return F.conv2d(x, weight, bias, *geometry).mul_(alpha)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, alpha = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        wants_x, wants_weight, wants_bias, wants_alpha = ctx.needs_input_grad[:4]
        grad_x, plain, summed = torch.ops.aten.convolution_backward(
            grad_outputs[0],
            x,
            weight * alpha.unsqueeze(-1),
            None if bias is None else list(bias.shape),
            *(stride, padding, dilation),
            *(False, [0, 0], groups),
            [
                wants_x,
                wants_weight or wants_alpha,
                bias is not None and (wants_bias or wants_alpha),
            ],
        )
        grad_weight = plain * alpha.unsqueeze(-1) if wants_weight else None
        grad_bias = summed * alpha.flatten() if wants_bias else None
        grad_alpha = None
        if wants_alpha:
            grad_alpha = (weight * plain).sum((1, 2, 3))
            if bias is not None:
                grad_alpha = grad_alpha + bias * summed
            grad_alpha = grad_alpha.view_as(alpha)
        return grad_x, grad_weight, grad_bias, grad_alpha, None, None, None, None
