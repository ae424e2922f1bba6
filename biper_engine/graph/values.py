"""What is known about a value of a network before anything is computed: dtype and shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from biper_engine.graph.sizes import ImagesSize, MisfitError, Size, require_small

__all__ = [
    "ANY",
    "BOOLS",
    "DTYPES",
    "FLOATS",
    "INTEGERS",
    "NUMBERS",
    "Value",
    "axes",
    "axis",
    "broadcast",
    "computing_dtype",
    "promoted",
    "require",
    "require_dtype",
    "same_dtype",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
BOOLS = (torch.bool,)
NUMBERS = (*FLOATS, *INTEGERS)
ANY = (*NUMBERS, *BOOLS)

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in ANY}
"""The dtypes of values, by their names in files."""

MAX_RANK = 8


@dataclass(frozen=True)
class Value:
    """A tensor of a network, for N images.

    Attributes:
        dtype: dtype of its elements.
        shape: its sizes.
        channels: number of bits in a pixel of a packed map; None for every other value.
        flows: whether it is computed in a call, from the caller's inputs or from sizes.
        constant: the tensor itself, if the network holds it and its values may be read.
        limits: the smallest and the largest integer that it may contain; None if unknown.
        dense: whether its memory is contiguous, in the order of its dimensions.
    """

    dtype: torch.dtype
    shape: tuple[Size, ...]
    channels: int | None = None
    flows: bool = True
    constant: Tensor | None = field(default=None, compare=False, repr=False)
    limits: tuple[int, int] | None = None
    dense: bool = False

    def __post_init__(self) -> None:
        require(len(self.shape) <= MAX_RANK, f"a value has {len(self.shape)} dimensions")
        for size in self.shape:
            if not size >= 0:
                raise MisfitError(f"a value would have the size {size}")
        require_small(self.shape)

    @classmethod
    def of_constant(cls, tensor: Tensor, *, open: bool = True) -> Value:
        """Return the value of a tensor that the network holds.

        Args:
            tensor: a tensor of the network.
            open: whether rules may read its values.
        """
        constant = tensor if open else None
        return cls(tensor.dtype, tuple(tensor.shape), flows=False, constant=constant, dense=True)

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def like(self, *shape: Size, dtype: torch.dtype | None = None) -> Value:
        """Return another computed value, of the same dtype unless one is given."""
        return Value(dtype or self.dtype, shape)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        sizes = ", ".join(map(str, self.shape))
        return f"{kind} [{sizes}]" + (f" of {self.channels} channels" if self.channels else "")


def require(condition: bool, message: str) -> None:
    """Raise MisfitError unless a condition holds."""
    if not condition:
        raise MisfitError(message)


def require_dtype(name: str, value: Value, dtypes: Sequence[torch.dtype]) -> None:
    """Require one of the dtypes, and not a packed map."""
    if value.channels is not None:
        raise MisfitError(f"`{name}` is a packed map, which only operators on bits take")
    if value.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise MisfitError(f"`{name}` must be one of {known}, but it is {value}")


def same_dtype(dtypes: Sequence[torch.dtype], **values: Value | None) -> torch.dtype:
    """Require one of the dtypes, the same for all given values; return it."""
    given = {name: value for name, value in values.items() if value is not None}
    first = next(iter(given.values()))
    for name, value in given.items():
        require_dtype(name, value, dtypes)
        if value.dtype != first.dtype:
            raise MisfitError(f"`{name}` must be {first.dtype}, but it is {value}")
    return first.dtype


def axis(dim: int, rank: int) -> int:
    """Return a dimension counted from the front."""
    if not -rank <= dim < rank:
        raise MisfitError(f"dimension {dim} of a value of {rank} dimensions")
    return dim % rank


def axes(dims: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return different dimensions, counted from the front."""
    found = tuple(axis(dim, rank) for dim in dims)
    require(len(set(found)) == len(found), f"`dim` (={list(dims)}) names a dimension twice")
    return found


def broadcast(*shapes: Sequence[Size]) -> tuple[Size, ...]:
    """Return the shape of an elementwise result."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    result: list[Size] = []
    for sizes in zip(*padded, strict=True):
        wide = {size for size in sizes if size != 1}
        if len(wide) > 1:
            texts = " and ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
            raise MisfitError(f"shapes {texts} cannot be broadcast together")
        result.append(wide.pop() if wide else 1)
    return tuple(result)


def _category(dtype: torch.dtype) -> int:
    return 2 if dtype.is_floating_point else int(dtype != torch.bool)


def _number_dtype(number: Any) -> torch.dtype:
    if isinstance(number, bool):
        return torch.bool
    return torch.float32 if isinstance(number, float) else torch.int64


def promoted(*operands: Any) -> torch.dtype:
    """Return the dtype in which PyTorch computes with values, numbers and sizes.

    The dtypes of values with dimensions decide; those of values without any, and of numbers, count
    only if they are of a higher category (bool, integer, float).
    """
    ranked: list[tuple[int, torch.dtype]] = []
    for operand in operands:
        if isinstance(operand, Value):
            ranked.append((0 if operand.shape else 1, operand.dtype))
        elif isinstance(operand, (bool, int, float, ImagesSize)):
            ranked.append((2, _number_dtype(operand)))
    result: torch.dtype | None = None
    for level in range(3):
        found = [dtype for at, dtype in ranked if at == level]
        if not found:
            continue
        joint = found[0]
        for dtype in found[1:]:
            joint = torch.promote_types(joint, dtype)
        if result is None or _category(joint) > _category(result):
            result = joint
    assert result is not None
    return result


def computing_dtype(*operands: Any) -> torch.dtype:
    """Return the dtype of true division and the like: integers become float32."""
    dtype = promoted(*operands)
    return dtype if dtype.is_floating_point else torch.float32
