"""The kinds of arguments that operators take: the type and the range of each.

A tensor is a `Value`; a number that a network computes from its batch is an `ImagesSize`. A bool is
not an integer, and NaN is not a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from biper_engine.graph.sizes import ImagesSize, MisfitError
from biper_engine.graph.values import ANY, MAX_RANK, Value

__all__ = [
    "BOOL",
    "COUNT",
    "DIM",
    "DIMS",
    "DTYPE",
    "FALSE",
    "FLOAT",
    "INDEX",
    "LAYOUT",
    "NONE",
    "NUMBER",
    "PART",
    "PARTS",
    "SHAPE",
    "SIZE",
    "TENSOR",
    "TENSORS",
    "Kind",
    "choice",
    "integer",
    "integers",
    "number",
    "optional",
]

_MOST = (1 << 31) - 1
"""The largest size, stride, padding and so on; native programs count in 32 bits."""

_MOST_TENSORS = 1024
"""The value of one argument."""


@dataclass(frozen=True)
class Kind:
    """What an argument may be.

    Attributes:
        wanted: description that completes "must be".
        accepts: whether a value is of this kind.
        is_computed_with: whether a call converts this number to the dtype of its tensors.
    """

    wanted: str
    accepts: Callable[[Any], bool]
    is_computed_with: bool = False

    def check(self, name: str, value: Any) -> None:
        """Require a value of this kind.

        Raises:
            MisfitError: the value is not of this kind.
        """
        if not self.accepts(value):
            raise MisfitError(f"`{name}` must be {self.wanted}, but it is {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value[:9]))}]"
    return str(value) if isinstance(value, Value | ImagesSize) else f"{value!r:.100}"


def _is_integer(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def optional(kind: Kind) -> Kind:
    """Return the kind of an argument that may also be None."""
    return Kind(
        f"{kind.wanted} or None",
        lambda value: value is None or kind.accepts(value),
        kind.is_computed_with,
    )


def integer(low: int, high: int = _MOST) -> Kind:
    """Return the kind of an integer in [low, high]."""
    return Kind(f"an integer from {low} to {high}", lambda value: _is_integer(value, low, high))


def integers(counts: Sequence[int], low: int, high: int = _MOST) -> Kind:
    """Return the kind of a list of integers in [low, high], with one of the given lengths."""
    lengths = " or ".join(map(str, counts)) if len(counts) < 4 else f"{counts[0]} to {counts[-1]}"
    return Kind(
        f"{lengths} integers from {low} to {high}",
        lambda value: (
            _is_list(value)
            and len(value) in counts
            and all(_is_integer(item, low, high) for item in value)
        ),
    )


def number(low: float = -math.inf, high: float = math.inf) -> Kind:
    """Return the kind of a finite number in [low, high]."""
    return Kind(
        "a finite number" + ("" if math.isinf(low) else f" from {low} to {high}"),
        lambda value: (
            (type(value) is float and math.isfinite(value) and low <= value <= high)
            or (_is_integer(value, -(1 << 53), 1 << 53) and low <= value <= high)
        ),
        is_computed_with=True,
    )


def choice(*names: str) -> Kind:
    """Return the kind of a string that is one of `names`."""
    return Kind(
        f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return True
    if isinstance(value, float):
        return not math.isnan(value)
    return _is_integer(value, -(1 << 53), 1 << 53)


def _is_size(value: Any) -> bool:
    return isinstance(value, ImagesSize) or _is_integer(value, 0, _MOST)


TENSOR = Kind("a tensor", lambda value: isinstance(value, Value))
TENSORS = Kind(
    "tensors",
    lambda value: (
        _is_list(value)
        and 1 <= len(value) <= _MOST_TENSORS
        and all(isinstance(item, Value) for item in value)
    ),
)
INDEX = Kind(
    "a list of indices, each a tensor or None",
    lambda value: (
        _is_list(value)
        and 1 <= len(value) <= MAX_RANK
        and all(item is None or isinstance(item, Value) for item in value)
    ),
)
BOOL = Kind("true or false", lambda value: isinstance(value, bool))
FALSE = Kind("false", lambda value: value is False)
NONE = Kind("None", lambda value: value is None)
FLOAT = number()
NUMBER = Kind("a number", lambda value: _is_number(value) or isinstance(value, ImagesSize), True)
COUNT = integer(1)
DIM = integer(-MAX_RANK, MAX_RANK - 1)
DIMS = integers(range(MAX_RANK + 1), -MAX_RANK, MAX_RANK - 1)
SIZE = Kind(f"a size from 0 to {_MOST}", _is_size)
PART = Kind(f"a size from 1 to {_MOST}", lambda value: _is_size(value) and value != 0)
PARTS = Kind(
    f"1 to {_MOST_TENSORS - 1} sizes from 0 to {_MOST}",
    lambda value: _is_list(value) and 1 <= len(value) < _MOST_TENSORS and all(map(_is_size, value)),
)
SHAPE = Kind(
    f"sizes from 0 to {_MOST}, or -1 to infer one",
    lambda value: (
        _is_list(value)
        and len(value) <= MAX_RANK
        and all(_is_size(item) or _is_integer(item, -1, -1) for item in value)
    ),
)
DTYPE = Kind("a dtype", lambda value: isinstance(value, torch.dtype) and value in ANY)
LAYOUT = Kind(
    "a memory layout",
    lambda value: (
        value in (torch.contiguous_format, torch.preserve_format, torch.channels_last, None)
    ),
)
