"""Binarizers as differentiable functions: sign forward, a surrogate gradient backward.

`sign(0)` is 0 here, as in PyTorch and in the code of the networks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from biper_engine.nn.binarizers import wave
from biper_engine.ops.sign_gradient import scaled_sign_gradient, window

__all__ = ["SCALE_EPSILON", "binarize_activation", "binarize_weight", "straight_through"]

# Added to the variance of the per-sample scale; the official code's value.
SCALE_EPSILON = 1e-5


def binarize_weight(
    weight: Tensor, *, frequency: float, stage: int, binarizer: str = "periodic"
) -> Tensor:
    """Map latent weights to the weights that the layer multiplies with.

    Stage 1: `sin(frequency * weight)`, which is differentiable.
    Stage 2: `sign(sin(frequency * weight))`, a square wave of period 2*pi/frequency. The sign is
    straight-through, so the gradient is that of stage 1: `frequency * cos(frequency * weight)`.
    Another `binarizer` has another function in the place of the sine: see `nn.binarizers`.

    Args:
        weight: latent weights, any shape, floating point.
        frequency: w0 of the paper.
        stage: 1 or 2.
        binarizer: "periodic", "sign", "sawtooth" or "triangle".

    Returns:
        Tensor like `weight`; in stage 2 every value is -1 or +1, or 0 where the wave is 0.

    Source: BiPer, CVPR 2024; BinarizeConv2d and BinaryQuantize in the official
    cifar10/modules/binarized_modules.py.
    """
    real = wave(weight, frequency, binarizer)
    return real if stage == 1 else _apply(_StraightThroughSign, real)


def binarize_activation(
    x: Tensor, *, scale_dims: tuple[int, ...] = (), surrogate: str = "bireal"
) -> Tensor:
    """Return `sign(x)` with the piecewise-linear surrogate gradient of Bi-Real Net.

    Without `scale_dims`, `dL/dx = dL/dy * max(0, 2 - |2x|)`. With them, the gradient is that of

        sign(x / sqrt(x.var(scale_dims, keepdim=True) + 1e-5))

    including the path through the variance. The scale is positive, so it never changes the
    result. It only sets how much of a sample falls into the window |.| < 1 in which the surrogate
    passes gradients. The scale is therefore computed in the backward pass only.

    Args:
        x: activations, floating point.
        scale_dims: negative dimensions of one sample, which needs two elements or more in total.
        surrogate: "bireal"; "clip" has a gradient of 1 where |x| <= 1, "identity" everywhere.

    Returns:
        Tensor like `x` with values -1, 0 (only for 0) and +1; NaN stays NaN.

    Source: Liu et al., "Bi-Real Net", ECCV 2018, eq. 7; BinaryQuantize_a in the official code.
    """
    if not scale_dims:
        return _apply(_Sign, x, surrogate)
    return _apply(_ScaledSign, x, scale_dims, surrogate)


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return exactly `value`, with the gradient of `surrogate`.

    `value.detach() + surrogate - surrogate.detach()` has the same gradient, but rounds the value.

    Args:
        value: what the forward pass computes; no gradient reaches it.
        surrogate: of the same shape; it gets the gradient of the result.
    """
    return _apply(_ValueWithGradientOf, value, surrogate)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return result


class _StraightThroughSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


class _ValueWithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        return None, grad_outputs[0]


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        return torch.sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return window(x, x.new_ones(()), ctx.surrogate).mul_(grad_outputs[0]), None


class _ScaledSign(torch.autograd.Function):
    """Sign with the gradient of x / sqrt(var + eps) and the surrogate's window."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...], surrogate: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dims, ctx.surrogate = dims, surrogate
        return torch.sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        gradient = grad_outputs[0]
        return (
            scaled_sign_gradient(x, gradient, ctx.dims, ctx.surrogate, SCALE_EPSILON),
            None,
            None,
        )
