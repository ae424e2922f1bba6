"""The declaration of an operator, and tables of operators.

An operator of converted networks is declared once, in the file of its kind. Files, shapes,
batching, recognition and native steps read the declaration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from biper_engine.graph.arguments import Kind
from biper_engine.graph.reading import defaults_of
from biper_engine.graph.rows import RowsRule, mixes
from biper_engine.graph.sizes import MisfitError, Size
from biper_engine.graph.values import Value

__all__ = ["Numbers", "Operator", "Result", "Rule", "passing", "table"]

Result = Value | Size | tuple[Value, ...]
Rule = Callable[..., Result]

# Arguments that say where a result is made and don't change its values. Files leave them out.
_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "device": (None,),
    "layout": (None, torch.strided),
    "pin_memory": (None, False),
    "non_blocking": (None, False),
}


class Numbers(Enum):
    """How the numbers of a result come from those of the operands, if few of them stay few."""

    ELEMENTWISE = "each is computed only from those at the same place, or channel"
    MOVED = "they are those of the first operand, at other places"
    LARGEST = "they are some of the first operand's, the largest or smallest"
    JOINED = "they are those of all operands"
    SPLIT = "those of each result are those of the first operand"


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator that a converted network may call.

    Attributes:
        name: in files; it does not change with PyTorch.
        target: the callable: an overload, or a Python function on sizes.
        arguments: the kinds of those that files may hold, by the target's names for them.
        result: takes all arguments by name and returns the result as values of the right dtype,
            shape and channels. It raises MisfitError if the arguments do not fit.
        rows: whether row i of the result depends only on row i of each operand.
        numbers: how the numbers of the result come from those of the operands; None for any other
            way. Conversion uses it to follow binary values.
        also: other targets with the same arguments, which files store as this one: whatever they
            may return, this one returns.
    """

    name: str
    target: Any
    arguments: Mapping[str, Kind]
    result: Rule
    rows: RowsRule = mixes
    numbers: Numbers | None = None
    also: tuple[Any, ...] = ()

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Default values of the arguments."""
        return defaults_of(self.target) if isinstance(self.target, OpOverload) else {}

    def named(self, node: fx.Node) -> dict[str, Any]:
        """Return a node's arguments by name, without the defaults.

        Raises:
            MisfitError: there are more arguments than the target takes.
        """
        overload = isinstance(self.target, OpOverload)
        names = [a.name for a in self.target._schema.arguments] if overload else [*self.arguments]
        if len(node.args) > len(names):
            raise MisfitError(f"{len(node.args)} arguments, but {self.name} takes {len(names)}")
        return {**dict(zip(names, node.args, strict=False)), **node.kwargs}

    def is_elsewhere(self, argument: str, value: Any) -> bool:
        """Whether an argument only says where the result is; files leave it out."""
        anywhere = argument == "device" and isinstance(value, torch.device)
        return anywhere or value in _ELSEWHERE.get(argument, ())

    def infer(self, given: Mapping[str, Any]) -> Result:
        """Check every argument of a call and return its result.

        Args:
            given: arguments by name, tensors as `Value`; missing ones get their defaults.

        Raises:
            MisfitError: an argument is missing, unknown, of another kind, or does not fit.
        """
        for name in given:
            if name not in self.arguments:
                raise MisfitError(
                    f"`{name}` is not an argument of {self.name}, "
                    f"which has {', '.join(self.arguments)}"
                )
        complete = self.complete(given)
        for name in given:
            self.arguments[name].check(name, given[name])
        self._require_representable(given)
        return self.result(**complete)

    def _require_representable(self, given: Mapping[str, Any]) -> None:
        """Require numbers that the smallest float dtype among the operands can hold."""
        numbers = {
            name: value
            for name, value in given.items()
            if self.arguments[name].is_computed_with and isinstance(value, int | float)
        }
        if not numbers:
            return
        dtypes = [x.dtype for x in given.values() if isinstance(x, Value)]
        largest = min((torch.finfo(d).max for d in dtypes if d.is_floating_point), default=math.inf)
        for name, value in numbers.items():
            if not math.isinf(value) and abs(value) > largest:
                raise MisfitError(f"`{name}` (={value}) is more than {largest}")

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return every argument by name, in order; missing ones get their defaults.

        Raises:
            MisfitError: an argument without a default is missing.
        """
        defaults = self.defaults
        complete = {}
        for name in self.arguments:
            if name not in given and name not in defaults:
                raise MisfitError(f"`{name}` is missing")
            complete[name] = given[name] if name in given else defaults[name]
        return complete


def passing(numbers: Numbers, operators: Iterable[Operator]) -> list[Operator]:
    """Return copies of operators that declare how the numbers of their results come about."""
    return [replace(operator, numbers=numbers) for operator in operators]


def table(*groups: Iterable[Operator]) -> dict[str, Operator]:
    """Return operators by name.

    Raises:
        ValueError: two operators have the same name.
    """
    found: dict[str, Operator] = {}
    for group in groups:
        for operator in group:
            if operator.name in found:
                raise ValueError(f"Two operators are called {operator.name!r}.")
            found[operator.name] = operator
    return found
