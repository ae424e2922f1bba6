"""How far binary weights are from the wave that stands for them in the gradient.

Two measures are in use, with s = wave(w), sin(w0*w) for BiPer, and q = sign(s):

    the paper's          min over c of mean((s - c*q)^2) = mean(s^2) - mean(|s|)^2
    the official code's  mean(|s - q|), with no scale       (cifar10/vis_get_QE.py)

For weights of a Laplace distribution with mean 0 and scale b, the paper's has a closed form in
u = b*w0, since then

    E[s^2] = 2u^2 / (1 + 4u^2)         E[|s|] = u / (1 + u^2) * coth(pi / (2u))

It rises from 0 to 0.1028 at u = 0.955, and falls to 1/2 - (2/pi)^2 = 0.0947. Real weights differ
from that distribution: they are measured, and the closed form is for comparison.

Source: Vargas et al., "BiPer", CVPR 2024, for the measure and the maximum; the closed form was
derived here and has that maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, tanh

import torch
from torch import Tensor, nn

from biper_engine.nn.binarizers import wave
from biper_engine.nn.binary_layer import binary_layers
from biper_engine.nn.layers import BinaryConv2d, BinaryLinear

__all__ = ["WeightError", "laplace_error", "weight_errors", "weight_wave"]


@dataclass(frozen=True, kw_only=True)
class WeightError:
    """The quantization error of one layer, with s = sin(w0*w) or another wave, and q = sign(s).

    Attributes:
        error: the paper's measure, min over c of mean((s - c*q)^2).
        official: the official code's measure, mean(|s - q|).
        spread: mean of |w|, the scale b of the Laplace distribution that fits best.
        closed_form: the paper's measure for that distribution; None for other waves than the sine.
    """

    error: float
    official: float
    spread: float
    closed_form: float | None


def laplace_error(u: float) -> float:
    """Return `WeightError.error` of weights of a Laplace distribution of scale b.

    Args:
        u: b*w0, 0 or more.
    """
    if u < 0:
        raise ValueError(f"`u` (={u}) must be 0 or more: it is a scale times a frequency.")
    if u == 0:
        return 0.0
    square = 2 * u**2 / (1 + 4 * u**2)
    size = u / (1 + u**2) / tanh(pi / (2 * u))
    return square - size**2


def weight_wave(layer: nn.Module) -> Tensor | None:
    """Return the wave of a layer's latent weights, or None if it is not one of BiPer's layers."""
    if not isinstance(layer, BinaryConv2d | BinaryLinear):
        return None
    return wave(layer.weight.detach(), layer.frequency, layer.weight_binarizer)


@torch.no_grad()
def weight_errors(module: nn.Module) -> dict[str, WeightError]:
    """Measure every layer of BiPer in `module`, by name.

    Layers of other networks binarize in other ways, and are left out. A GPU is waited for once.
    """
    layers = {
        name: layer
        for name, layer in binary_layers(module)
        if isinstance(layer, BinaryConv2d | BinaryLinear)
    }
    if not layers:
        return {}
    measured = torch.stack([_measured(layer) for layer in layers.values()]).tolist()
    return {
        name: WeightError(
            error=max(0.0, square - size**2),
            official=official,
            spread=spread,
            closed_form=laplace_error(spread * layer.frequency)
            if layer.weight_binarizer == "periodic"
            else None,
        )
        for (name, layer), (square, size, official, spread) in zip(
            layers.items(), measured, strict=True
        )
    }


def _measured(layer: BinaryConv2d | BinaryLinear) -> Tensor:
    """Return mean(s^2), mean(|s|), mean(|s - sign(s)|) and mean(|w|)."""
    real = wave(layer.weight, layer.frequency, layer.weight_binarizer)
    means = (real.square(), real.abs(), (real - real.sign()).abs(), layer.weight.abs())
    return torch.stack([values.mean() for values in means])
