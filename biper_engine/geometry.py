"""Shapes of convolutions and pools; only this module computes output sizes and valid taps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from biper_engine.bits import words
from biper_engine.errors import GeometryError

__all__ = ["Conv2dGeometry", "Pool2dGeometry", "pool_positions"]

MAX_REDUCTION = 1 << 24


def _axis_size(size: int, kernel: int, stride: int, before: int, after: int, dilation: int) -> int:
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def pool_positions(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Return the number of windows of a float pool along one axis, as in PyTorch.

    `ceil_mode` adds a last, partial window if it starts inside the map or the padding before it.
    """
    if not ceil_mode:
        return _axis_size(size, kernel, stride, padding, padding, 1)
    positions = _axis_size(size, kernel, stride, padding, padding + stride - 1, 1)
    return positions - ((positions - 1) * stride >= size + padding)


def _require(name: str, values: Sequence[int], length: int, minimum: int) -> tuple[int, ...]:
    fits = isinstance(values, Sequence) and len(values) == length
    if not fits or not all(isinstance(v, (int, torch.SymInt)) and v >= minimum for v in values):
        raise GeometryError(
            f"`{name}` (={values}) must be {length} integers, each at least {minimum}."
        )
    return tuple(values)


@dataclass(frozen=True, kw_only=True)
class Conv2dGeometry:
    """Parameters of a binary convolution, except for the image size.

    Attributes:
        in_channels: unpacked input channels, C.
        out_channels: output channels, O.
        kernel_size: (KH, KW).
        stride: (vertical, horizontal).
        padding: true zeros added at (top, bottom, left, right).
        dilation: (vertical, horizontal).
        groups: blocked connections from input to output, as in `torch.nn.Conv2d`.

    Raises:
        GeometryError: a value is out of range, or `groups` does not divide both channel counts.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        for name, length, minimum in (
            ("kernel_size", 2, 1),
            ("stride", 2, 1),
            ("padding", 4, 0),
            ("dilation", 2, 1),
        ):
            object.__setattr__(self, name, _require(name, getattr(self, name), length, minimum))
        if self.in_channels < 1 or self.out_channels < 1:
            raise GeometryError(
                f"`in_channels` (={self.in_channels}) and `out_channels` (={self.out_channels}) "
                "must be at least 1."
            )
        if self.groups < 1 or self.in_channels % self.groups or self.out_channels % self.groups:
            raise GeometryError(
                f"`in_channels` (={self.in_channels}) and `out_channels` (={self.out_channels}) "
                f"must be divisible by `groups` (={self.groups})."
            )
        if self.reduction >= MAX_REDUCTION:
            raise GeometryError(
                f"KH * KW * in_channels / groups (={self.reduction}) must be below "
                f"{MAX_REDUCTION}, so that every accumulator is exact in float32."
            )

    @property
    def group_channels(self) -> int:
        """Input channels of one output channel, C / groups."""
        return self.in_channels // self.groups

    @property
    def taps(self) -> int:
        """Kernel positions, KH * KW."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def reduction(self) -> int:
        """K = KH * KW * C / groups: every accumulator lies in [-K, K]."""
        return self.taps * self.group_channels

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the canonical packed weights."""
        return (self.out_channels, *self.kernel_size, words(self.group_channels))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (OH, OW).

        Raises:
            GeometryError: the image is empty, or the dilated kernel exceeds the padded image.
        """
        top, bottom, left, right = self.padding
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        size = (
            _axis_size(height, kh, sh, top, bottom, dh),
            _axis_size(width, kw, sw, left, right, dw),
        )
        if height < 1 or width < 1 or size[0] < 1 or size[1] < 1:
            raise GeometryError(
                f"A {kh}x{kw} kernel with dilation {self.dilation} does not fit into a "
                f"{height}x{width} image padded by {self.padding} (top, bottom, left, right)."
            )
        return size

    def macs(self, height: int, width: int) -> int:
        """Return the multiply-accumulates of one image, including padded taps."""
        rows, columns = self.output_size(height, width)
        return rows * columns * self.out_channels * self.reduction


@dataclass(frozen=True, kw_only=True)
class Pool2dGeometry:
    """A max pool; padding never wins.

    Attributes:
        kernel_size: (KH, KW).
        stride: (vertical, horizontal).
        padding: (vertical, horizontal), on both sides, at most half the kernel.
    """

    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for name, minimum in (("kernel_size", 1), ("stride", 1), ("padding", 0)):
            object.__setattr__(self, name, _require(name, getattr(self, name), 2, minimum))
        if any(2 * p > k for p, k in zip(self.padding, self.kernel_size, strict=True)):
            raise GeometryError(
                f"`padding` (={self.padding}) of a pool must be at most half of `kernel_size` "
                f"(={self.kernel_size})."
            )

    @property
    def is_identity(self) -> bool:
        """Whether the pool changes nothing."""
        return self == Pool2dGeometry()

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (OH, OW).

        Raises:
            GeometryError: the map is empty, or the window is larger than the padded map.
        """
        (kh, kw), (sh, sw), (ph, pw) = self.kernel_size, self.stride, self.padding
        size = (_axis_size(height, kh, sh, ph, ph, 1), _axis_size(width, kw, sw, pw, pw, 1))
        if height < 1 or width < 1 or size[0] < 1 or size[1] < 1:
            raise GeometryError(
                f"A {kh}x{kw} pool does not fit into a {height}x{width} map padded by "
                f"{self.padding}."
            )
        return size
