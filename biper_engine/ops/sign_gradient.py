"""The gradient of a sign whose activations are scaled per sample: a formula, and one native pass.

The native kernel has the same bytes for every instruction set and number of threads. Its sums are
more exact than those of the formula: up to 128 values are added in float, the rest in double.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biper_engine.ops.cpu_module import native
from biper_engine.ops.cpu_threads import thread_count
from biper_engine.ops.native_arguments import native_memory
from biper_engine.ops.registration import register

__all__ = ["SIGN_GRADIENT_SCHEMAS", "SURROGATES", "scaled_sign_gradient", "window"]

# dL/dx of sign(x) is dL/dy times this, with u the activation, scaled where a layer scales it:
#   bireal    max(0, 2 - |2u|)        Liu et al., "Bi-Real Net", ECCV 2018, eq. 7
#   clip      1 where |u| <= 1        Hubara et al., NeurIPS 2016, eq. 4
#   identity  1                       Bengio et al., arXiv:1308.3432
# The order is that of `Surrogate` in csrc/cpu/kernels.h.
SURROGATES = ("bireal", "clip", "identity")

SIGN_GRADIENT_SCHEMAS = {
    "sign_gradient": (
        "(Tensor x, Tensor gradient, int sample_dims, *, str surrogate, float epsilon) -> Tensor"
    )
}


def window(x: Tensor, scale: Tensor, surrogate: str) -> Tensor:
    """Return the factor of the gradient for u = scale * x, as a new tensor; scale is positive."""
    if surrogate == "bireal":
        return torch.addcmul(x.new_tensor(2.0), x.abs(), scale, value=-2).clamp_(min=0)
    if surrogate == "clip":
        return ((x * scale).abs() <= 1).to(x.dtype)
    return torch.ones_like(x)


def scaled_sign_gradient(
    x: Tensor, gradient: Tensor, dims: tuple[int, ...], surrogate: str, epsilon: float
) -> Tensor:
    """Return the gradient of `sign(x * rsqrt(x.var(dims, keepdim=True) + epsilon))`.

    With n elements per sample, mean m, r = (var + eps)^-1/2, u = r*x and g = dL/du, which is the
    gradient within the surrogate's window:

        dL/dx = r*g - (x - m) * r^3 * sum(g*x) / (n - 1)

    The second term is the path through the variance, dr/dx = -r^3 * (x - m) / (n - 1).

    Args:
        x: activations, of any floating type.
        gradient: of the sign, like `x`.
        dims: negative dimensions of a sample.
        surrogate: "bireal", "clip" or "identity".
        epsilon: added to the variance.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == gradient.dtype == torch.float32
    # Code of torch.compile has the formula, which the compiler can fuse with what is around it.
    compiling = torch.compiler.is_compiling()
    if on_cpu and not compiling and dims == tuple(range(-len(dims), 0)):
        options = {"surrogate": surrogate, "epsilon": epsilon}
        result: Tensor = torch.ops.biper.sign_gradient(x, gradient, len(dims), **options)
        return result
    return _formula(x, gradient, dims, surrogate, epsilon)


def _formula(
    x: Tensor, gradient: Tensor, dims: tuple[int, ...], surrogate: str, epsilon: float
) -> Tensor:
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    # Two passes are used because torch.var_mean takes five times as long on CPU.
    centred = x - x.mean(dims, keepdim=True)
    variance = (centred * centred).sum(dims, keepdim=True) / (count - 1)
    scale = torch.rsqrt(variance + epsilon)
    grad = window(x, scale, surrogate).mul_(gradient)
    pull = (grad * x).sum(dims, keepdim=True) * scale**3 / (count - 1)
    return grad.mul_(scale).addcmul_(centred, pull, value=-1)


def _dense(x: Tensor, sample_dims: int) -> tuple[Tensor, torch.memory_format]:
    """Return `x` with the values of a sample side by side, and its memory format."""
    if x.dim() == 4 and sample_dims >= 3:
        last = torch.channels_last
        if not x.is_contiguous() and x.is_contiguous(memory_format=last):
            return x, last
    return x.contiguous(), torch.contiguous_format


def _check(x: Tensor, gradient: Tensor, sample_dims: int, surrogate: str) -> None:
    if x.dtype != torch.float32 or gradient.dtype != torch.float32:
        raise TypeError(
            f"`x` and `gradient` must be float32, but they are {x.dtype} and {gradient.dtype}."
        )
    if x.shape != gradient.shape or not 1 <= sample_dims <= x.dim():
        raise ValueError(
            f"`x` {tuple(x.shape)} and `gradient` {tuple(gradient.shape)} must have one shape with "
            f"{sample_dims} dimensions or more, and `sample_dims` (={sample_dims}) be 1 or more."
        )
    if surrogate not in SURROGATES:
        raise ValueError(f"`surrogate` (={surrogate!r}) must be one of {', '.join(SURROGATES)}.")


def _sign_gradient(
    x: Tensor, gradient: Tensor, sample_dims: int, *, surrogate: str, epsilon: float
) -> Tensor:
    _check(x, gradient, sample_dims, surrogate)
    x, layout = _dense(x, sample_dims)
    gradient = gradient.contiguous(memory_format=layout)
    out = torch.empty_like(x, memory_format=layout)
    if native() is None:
        dims = tuple(range(-sample_dims, 0))
        return out.copy_(_formula(x, gradient, dims, surrogate, epsilon))
    if x.numel() > 0:
        length = x.shape[x.dim() - sample_dims :].numel()
        native().sign_gradient(
            x.numel() // length,
            length,
            SURROGATES.index(surrogate),
            epsilon,
            native_memory(x),
            native_memory(gradient),
            native_memory(out),
            thread_count(),
        )
    return out


def _sign_gradient_fake(
    x: Tensor, gradient: Tensor, sample_dims: int, *, surrogate: str, epsilon: float
) -> Tensor:
    _check(x, gradient, sample_dims, surrogate)
    x, layout = _dense(x, sample_dims)
    return torch.empty_like(x, memory_format=layout)


for _name, _schema in SIGN_GRADIENT_SCHEMAS.items():
    register(_name, _schema, _sign_gradient, _sign_gradient_fake, keys=("CPU",))
