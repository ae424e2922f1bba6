"""Rivals, and the check that a rival must pass before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = [
    "TOLERANCE",
    "Rival",
    "check_images",
    "checked",
    "first_line",
    "missing",
    "relative_difference",
]

TOLERANCE = 1e-4
"""Largest norm of a difference over the norm of the outputs, for one image, in float32. Reordered
sums of 4608 products, through 20 layers, differ a hundred times less."""

_CHECKED_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A way to run the network or its float twin, or the reason why it cannot run here.

    Attributes:
        name: its name in tables.
        how: one line about its settings.
        call: takes images, returns what the network returns; None if `reason` is given.
        reason: why it does not run; empty if it does.
        bind: takes images and returns a call on them without arguments, for runtimes with their
            own input format: the time does not include the conversion. None binds `call`.
        wanted: computes what its outputs are compared with; None is the eager network.
        beside: what `wanted` is, in a word or two.
        agreed: images that agreed within `TOLERANCE` with `wanted`, and how many were tried; None
            if no agreement is required, as with bfloat16 and int8.
        rest_ms: how long its threads may spin after a call, and take a core from the next one.
        kernels: how many nodes each kind of kernel runs, if its runtime tells.
    """

    name: str
    how: str
    call: Callable[[Tensor], Any] | None = None
    reason: str = ""
    bind: Callable[[Tensor], Callable[[], Any]] | None = None
    wanted: Callable[[Tensor], Any] | None = None
    beside: str = "eager"
    agreed: tuple[int, int] | None = None
    rest_ms: float = 0.0
    kernels: dict[str, int] = field(default_factory=dict)

    def bound(self, images: Tensor) -> Callable[[], Any]:
        """Return a call on these images without arguments, which is timed.

        Raises:
            ValueError: the rival does not run.
        """
        if self.bind is not None:
            return self.bind(images)
        if self.call is None:
            raise ValueError(f"{self.name} does not run: {self.reason}")
        return partial(self.call, images)


def missing(*modules: str) -> str:
    """Return what to install if a module is not found, else an empty string."""
    absent = [name for name in modules if find_spec(name) is None]
    if not absent:
        return ""
    return f'{" and ".join(absent)} not installed; pip install "biper-engine[bench]"'


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def relative_difference(outputs: Any, wanted: Any) -> float:
    """Return the largest difference over the largest wanted value; the worst of several outputs."""
    pairs = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(wanted), strict=True)
    return max((_relative(a, b) for a, b in pairs if isinstance(a, Tensor)), default=0.0)


def _relative(outputs: Tensor, wanted: Tensor) -> float:
    scale = float(wanted.abs().max()) or 1.0
    return float((outputs - wanted).abs().max()) / scale


def check_images(images: Tensor) -> list[Tensor]:
    """Return seeded batches of the size of `images`, eight images or more in total."""
    generator = torch.Generator().manual_seed(1)
    count = -(-_CHECKED_IMAGES // len(images))
    return [torch.randn(images.shape, generator=generator) for _ in range(count)]


def checked(rival: Rival, batches: Iterable[Tensor], *, share: float = 1.0) -> Rival:
    """Compare a rival's outputs with `rival.wanted`, image by image.

    Args:
        rival: has `call` and `wanted`.
        batches: images to try.
        share: share of the images that must agree. It is below 1 if the network takes signs: an
            argument that is 0 except for rounding may flip a bit, and so change the whole image.
            A wrong graph differs on every image.

    Returns:
        The rival with `agreed`, or without `call` and with a reason.
    """
    assert rival.call is not None
    assert rival.wanted is not None
    errors = [
        error
        for images in batches
        for error in _relative_norms(rival.call(images), rival.wanted(images))
    ]
    agreed = sum(error <= TOLERANCE for error in errors)
    if agreed >= share * len(errors):
        return replace(rival, agreed=(agreed, len(errors)))
    reason = (
        f"it agrees with {rival.beside} on {agreed} of {len(errors)} images only; the largest "
        f"relative error is {max(errors):.1e}, wanted {TOLERANCE:.0e}"
    )
    return replace(rival, call=None, bind=None, reason=reason)


def _relative_norms(outputs: Tensor, wanted: Tensor) -> list[float]:
    """Return for each image the norm of the difference over the norm of the wanted outputs."""
    difference = (outputs - wanted).flatten(1).norm(dim=1)
    scale = wanted.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    # A NaN compares false with every tolerance, so it never agrees.
    errors: list[float] = (difference / scale).tolist()
    return errors
