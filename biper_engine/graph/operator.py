"""What a declaration of an operator says, and the table of all operators.

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

# Arguments that say where a result is made, and nothing of its values: files hold none of them.
_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "device": (None, torch.device("cpu")),
    "layout": (None, torch.strided),
    "pin_memory": (None, False),
    "non_blocking": (None, False),
}


class Numbers(Enum):
    """How the numbers of a result come from those of the operands, so that few stay few."""

    ELEMENTWISE = "each is computed from those at the same place, or channel, alone"
    MOVED = "they are the first operand's, at other places"
    LARGEST = "they are the first operand's, the largest or smallest of some"
    JOINED = "they are those of all operands"
    SPLIT = "those of each result are the first operand's"


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator that a converted network may call.

    Attributes:
        name: in files; it does not change with PyTorch.
        target: what runs it: an overload, or a function of Python on sizes.
        arguments: those that files may hold, by the names that the target has for them.
        result: from the arguments, all of them and by name, to the result: values of the right
            dtype, shape and channels. It raises MisfitError where they do not fit.
        rows: whether row i of the result depends on row i of each operand alone.
        numbers: how the numbers of the result come from those of the operands; None for any other
            way. Conversion follows binary values by it.
        also: other targets with the same arguments, which files write as this one: whatever they
            may give, this one gives.
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
        """Values of the arguments that may be left out."""
        return defaults_of(self.target) if isinstance(self.target, OpOverload) else {}

    def named(self, node: fx.Node) -> dict[str, Any]:
        """Return a node's arguments by name, defaults left out.

        Raises:
            MisfitError: there are more than the target takes.
        """
        overload = isinstance(self.target, OpOverload)
        names = [a.name for a in self.target._schema.arguments] if overload else [*self.arguments]
        if len(node.args) > len(names):
            raise MisfitError(f"{len(node.args)} arguments, but {self.name} takes {len(names)}")
        return {**dict(zip(names, node.args, strict=False)), **node.kwargs}

    def is_elsewhere(self, argument: str, value: Any) -> bool:
        """Whether an argument only says where the result is, as the CPU, which files leave out."""
        return value in _ELSEWHERE.get(argument, ())

    def infer(self, given: Mapping[str, Any]) -> Result:
        """Return what a call gives, after every argument has been checked.

        Args:
            given: arguments by name, tensors as `Value`; those left out have their defaults.

        Raises:
            MisfitError: an argument is missing, unknown, of another kind, or does not fit.
        """
        for name in given:
            if name not in self.arguments:
                raise MisfitError(
                    f"`{name}` is no argument of {self.name}, which has {', '.join(self.arguments)}"
                )
        complete = self.complete(given)
        for name in given:
            self.arguments[name].check(name, given[name])
        self._require_representable(given)
        return self.result(**complete)

    def _require_representable(self, given: Mapping[str, Any]) -> None:
        """Require numbers that the smallest dtype of floats among the operands can hold."""
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
        """Return every argument by name, in order; those left out have their defaults.

        Raises:
            MisfitError: one without a default is missing.
        """
        defaults = self.defaults
        complete = {}
        for name in self.arguments:
            if name not in given and name not in defaults:
                raise MisfitError(f"`{name}` is missing")
            complete[name] = given[name] if name in given else defaults[name]
        return complete


def passing(numbers: Numbers, operators: Iterable[Operator]) -> list[Operator]:
    """Return operators whose results have their numbers in one way."""
    return [replace(operator, numbers=numbers) for operator in operators]


def table(*groups: Iterable[Operator]) -> dict[str, Operator]:
    """Return operators by name.

    Raises:
        ValueError: two have one name.
    """
    found: dict[str, Operator] = {}
    for group in groups:
        for operator in group:
            if operator.name in found:
                raise ValueError(f"Two operators are called {operator.name!r}.")
            found[operator.name] = operator
    return found
