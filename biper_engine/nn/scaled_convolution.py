"""A convolution and its learned scale as one function, whose gradients cost no pass over its maps.

With y = conv(x, w) + b and z = alpha * y, per output channel, and g = dL/dz:

    dL/dx     = convolution backward of g with alpha * w
    dL/dw     = alpha * G, with G the gradient of w for g
    dL/db     = alpha * B, with B the sum of g
    dL/dalpha = sum(g * y) = sum(w * G) + b * B

since y is linear in w and b. Of the maps only x is kept, not y, and g is read by the convolution
alone. The product, the sum and the second map that autograd makes of `y * alpha` are not needed.
Where x and w are signs, the forward pass can run on bits; then the map whose sign x is is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from biper_engine.nn.functional import SCALE_EPSILON, binarize_activation
from biper_engine.ops.sign_gradient import scaled_sign_gradient
from biper_engine.ops.signed_convolution import signed_conv2d

__all__ = ["scaled_conv2d", "scaled_sign_conv2d"]

_SAMPLE = (-3, -2, -1)  # dimensions that the gradient of a sign is scaled over


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


def scaled_sign_conv2d(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    *,
    surrogate: str,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Return what `_in_float` does, byte for byte, with the forward pass on bits.

    It keeps `x` for the backward pass, and no signs.

    Args:
        x: [N, C, H, W], for which `signed_convolution.bits_pay` is true together with the rest.
        weight: [O, C / groups, KH, KW], each value -1, 0 or 1.
        alpha: [O, 1, 1].
        surrogate: as for `binarize_activation`.
        stride: of rows and columns.
        padding: the same, in numbers.
        dilation: the same.
        groups: as F.conv2d.
    """
    result: Tensor = _ScaledSignConv2d.apply(  # type: ignore[no-untyped-call]
        x, weight, alpha, surrogate, stride, padding, dilation, groups
    )
    return result


def _in_float(x: Tensor, weight: Tensor, alpha: Tensor, surrogate: str, *geometry: Any) -> Tensor:
    """Return alpha * conv(sign(x), weight), with the surrogate's gradient through the sign."""
    signs = binarize_activation(x, scale_dims=_SAMPLE, surrogate=surrogate)
    result: Tensor = _ScaledConv2d.apply(  # type: ignore[no-untyped-call]
        signs, weight, None, alpha, *geometry
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
        wanted = ctx.needs_input_grad[:4]
        x, weight, bias, alpha = ctx.saved_tensors
        gradients = _gradients(x, weight, bias, alpha, grad_outputs[0], ctx.geometry, wanted)
        return *gradients, None, None, None, None


class _ScaledSignConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, alpha: Tensor, surrogate: str, *geometry: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, alpha)
        ctx.surrogate, ctx.geometry = surrogate, geometry
        stride, padding, dilation, groups = geometry
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return signed_conv2d(x, weight, alpha, **options)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, alpha = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # for a second derivative: all of the float functions
            inputs = tuple(v for v, wants in zip((x, weight, alpha), wanted, strict=True) if wants)
            out = _in_float(x, weight, alpha, ctx.surrogate, *ctx.geometry)
            found = iter(torch.autograd.grad(out, inputs, grad_outputs, create_graph=True))
            return *(next(found) if wants else None for wants in wanted), *(None,) * 5
        grad_x, grad_weight, _, grad_alpha = _gradients(
            *(torch.sign(x), weight, None, alpha, grad_outputs[0], ctx.geometry),
            (wanted[0], wanted[1], False, wanted[2]),
        )
        if grad_x is not None:
            grad_x = scaled_sign_gradient(x, grad_x, _SAMPLE, ctx.surrogate, SCALE_EPSILON)
        return grad_x, grad_weight, grad_alpha, *(None,) * 5


def _gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    gradient: Tensor,
    geometry: tuple[Any, ...],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and alpha, those that are wanted."""
    stride, padding, dilation, groups = geometry
    wants_x, wants_weight, wants_bias, wants_alpha = wanted
    grad_x, plain, summed = torch.ops.aten.convolution_backward(
        gradient,
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
    return grad_x, grad_weight, grad_bias, grad_alpha
