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

from biper_engine.ops.sign_gradient import SURROGATES

__all__ = ["ACTIVATION_SURROGATES", "WEIGHT_BINARIZERS", "known_name", "wave"]


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

ACTIVATION_SURROGATES = SURROGATES


def wave(weight: Tensor, frequency: float, binarizer: str) -> Tensor:
    """Return the wave of latent weights, with its gradient."""
    return WEIGHT_BINARIZERS[binarizer](weight, frequency)


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
