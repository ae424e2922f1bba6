"""What latent weights become, and how the sign of an activation passes gradients, by name.

Every weight binarizer has a wave: stage 1 multiplies with the wave, stage 2 with its sign, and the
gradient of stage 2 is that of the wave. With t = frequency * w:

    periodic   sin(t)                                        BiPer
    sawtooth   t / pi, taken into [-1, 1] by its period 2    period and signs of sin(t)
    triangle   2 / pi * asin(sin(t))                         period and signs of sin(t)
    sign       clamp(w, -1, 1), whatever the frequency       most other binary networks

Source: Vargas et al., "BiPer", CVPR 2024. Sawtooth and other waves in the place of the sine were
proposed by Qi, "M-BiPer", Applied and Computational Engineering 146 (2025); the waves here are the
usual ones of these names, with the sine's period, as that paper's own formulas were not at hand.
"sign" is Hubara et al., "Binarized Neural Networks", NeurIPS 2016, eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from math import pi

import torch
from torch import Tensor

__all__ = ["ACTIVATION_SURROGATES", "WEIGHT_BINARIZERS", "known_name", "wave", "window"]


def _periodic(weight: Tensor, frequency: float) -> Tensor:
    return torch.sin(frequency * weight)


def _turn(weight: Tensor, frequency: float) -> Tensor:
    """Return frequency * w in whole turns, taken into [-1/2, 1/2]."""
    turns = weight * (frequency / (2 * pi))
    return turns - turns.detach().round()


def _sawtooth(weight: Tensor, frequency: float) -> Tensor:
    return 2 * _turn(weight, frequency)


def _triangle(weight: Tensor, frequency: float) -> Tensor:
    rising = 4 * _turn(weight, frequency)
    falling = 2 * torch.sign(rising.detach()) - rising
    return torch.where(rising.detach().abs() <= 1, rising, falling)


def _clamped(weight: Tensor, frequency: float) -> Tensor:
    return weight.clamp(-1, 1)


WEIGHT_BINARIZERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "periodic": _periodic,
    "sign": _clamped,
    "sawtooth": _sawtooth,
    "triangle": _triangle,
}

# dL/dx of sign(x) is dL/dy times this, with u the activation, scaled where a layer scales it:
#   bireal    max(0, 2 - |2u|)        Liu et al., "Bi-Real Net", ECCV 2018, eq. 7
#   clip      1 where |u| <= 1        Hubara et al., NeurIPS 2016, eq. 4
#   identity  1                       Bengio et al., arXiv:1308.3432
ACTIVATION_SURROGATES = ("bireal", "clip", "identity")


def wave(weight: Tensor, frequency: float, binarizer: str) -> Tensor:
    """Return the wave of latent weights, with its gradient."""
    return WEIGHT_BINARIZERS[binarizer](weight, frequency)


def window(x: Tensor, scale: Tensor, surrogate: str) -> Tensor:
    """Return the factor of the gradient for u = scale * x, as a new tensor; scale is positive."""
    if surrogate == "bireal":
        return torch.addcmul(x.new_tensor(2.0), x.abs(), scale, value=-2).clamp_(min=0)
    if surrogate == "clip":
        return ((x * scale).abs() <= 1).to(x.dtype)
    return torch.ones_like(x)


def known_name(what: str, name: str, known: tuple[str, ...]) -> str:
    """Return `name` if it is known.

    Raises:
        ValueError: it is not; the message has the closest one.
    """
    if name in known:
        return name
    close = get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"Unknown {what} {name!r}.{hint} Known: {', '.join(known)}.")
