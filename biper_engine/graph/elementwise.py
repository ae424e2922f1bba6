"""Rules of operators that compute element by element, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import NUMBER, TENSOR, Kind
from biper_engine.graph.operator import Operator, Rule
from biper_engine.graph.sizes import ImagesSize, Size
from biper_engine.graph.values import (
    ANY,
    BOOLS,
    FLOATS,
    INTEGERS,
    NUMBERS,
    Value,
    broadcast,
    promoted,
    require,
    require_dtype,
)

__all__ = [
    "OPERANDS",
    "WITH_EITHER",
    "WITH_NUMBER",
    "arithmetic",
    "bitwise",
    "compared",
    "elementwise",
    "functions",
    "joint_shape",
    "of_floats",
    "of_numbers",
    "remainder",
    "require_operands",
    "require_range",
    "same",
    "to_bool",
    "two_forms",
]

_aten = torch.ops.aten

OPERANDS = {"self": TENSOR, "other": TENSOR}
WITH_NUMBER = {"self": TENSOR, "other": NUMBER}
WITH_EITHER = {
    "self": TENSOR,
    "other": Kind("a tensor or a number", lambda v: TENSOR.accepts(v) or NUMBER.accepts(v), True),
}


def elementwise(
    name: str, target: Any, arguments: Mapping[str, Kind], result: Rule, *also: Any
) -> Operator:
    """Return the declaration of an operator whose rows are computed one by one."""
    return Operator(
        name=name,
        target=target,
        arguments=arguments,
        result=result,
        rows=rows.elementwise,
        also=also,
    )


def same(dtypes: Sequence[torch.dtype]) -> Rule:
    """Return the rule of a result like its operand, whose dtype must be one of some."""

    def rule(self: Value, **options: Any) -> Value:
        require_dtype("self", self, dtypes)
        return self.like(*self.shape)

    return rule


def to_bool(dtypes: Sequence[torch.dtype]) -> Rule:
    """Return the rule of a question about each element."""

    def rule(self: Value) -> Value:
        require_dtype("self", self, dtypes)
        return self.like(*self.shape, dtype=torch.bool)

    return rule


def functions(names: str, dtypes: Sequence[torch.dtype]) -> list[Operator]:
    """Return the declarations of functions of one operand, by their names in ATen."""
    return [
        elementwise(name, getattr(_aten, name).default, {"self": TENSOR}, same(dtypes))
        for name in names.split()
    ]


def require_operands(dtypes: Sequence[torch.dtype], *operands: Any) -> None:
    """Require one of the dtypes for every operand that is a tensor."""
    for name, operand in zip(("self", "other", "third"), operands, strict=False):
        if isinstance(operand, Value):
            require_dtype(name, operand, dtypes)


def joint_shape(*operands: Any) -> tuple[Size, ...]:
    """Return the broadcast shape of the operands that are tensors."""
    return broadcast(*[x.shape for x in operands if isinstance(x, Value)])


def arithmetic(
    dtypes: Sequence[torch.dtype], dtype_of: Callable[..., torch.dtype] = promoted
) -> Rule:
    """Return the rule of an operator on two operands, of which one may have a factor `alpha`."""

    def rule(self: Value, other: Any, alpha: Any = 1, **options: Any) -> Value:
        require_operands(dtypes, self, other)
        dtype = dtype_of(self, other)
        fits = isinstance(alpha, int) or dtype.is_floating_point
        require(fits and not isinstance(alpha, bool), f"`alpha` (={alpha}) for {dtype}")
        return Value(dtype, joint_shape(self, other))

    return rule


def compared(self: Value, other: Any) -> Value:
    """Return the result of a comparison."""
    require_operands(ANY, self, other)
    return Value(torch.bool, joint_shape(self, other), limits=(0, 1))


def bitwise(self: Value, other: Any) -> Value:
    """Return the result of an operator on the bits of integers."""
    require_operands((*BOOLS, *INTEGERS), self, other)
    require(not isinstance(other, float), f"`other` (={other}) must be an integer")
    return Value(promoted(self, other), joint_shape(self, other))


def of_floats(self: Value, other: Any, **options: Any) -> Value:
    """Return the result of an operator on two floats."""
    require_operands(FLOATS, self, other)
    return Value(promoted(self, other), joint_shape(self, other))


def of_numbers(self: Value, other: Any) -> Value:
    """Return the result of a rounded quotient: of floats, or of integers and a positive number."""
    require_operands(NUMBERS, self, other)
    dtype = promoted(self, other)
    positive = isinstance(other, ImagesSize) or (type(other) is int and other > 0)
    require(dtype.is_floating_point or positive, f"division by {other}")
    return Value(dtype, joint_shape(self, other))


def remainder(self: Value, other: Any) -> Value:
    """Return the remainder of a division by a number."""
    require_dtype("self", self, NUMBERS)
    integers = not promoted(self, other).is_floating_point
    require(not integers or (type(other) is int and other != 0), f"division by {other}")
    return Value(promoted(self, other), self.shape)


def two_forms(
    name: str, packet: Any, tensors: Rule, numbers: Rule | None = None, **more: Kind
) -> list[Operator]:
    """Return an operator on two tensors, and `name_number` on a tensor and a number."""
    # Only these four take a number in place of a tensor in PyTorch.
    operands = WITH_EITHER if name in ("add", "sub", "mul", "div") else OPERANDS
    return [
        elementwise(name, packet.Tensor, {**operands, **more}, tensors),
        elementwise(f"{name}_number", packet.Scalar, {**WITH_NUMBER, **more}, numbers or tensors),
    ]


def require_range(dtype: torch.dtype, *numbers: Any) -> None:
    """Require numbers that an integer dtype can hold."""
    if dtype.is_floating_point or dtype == torch.bool:
        return
    limits = torch.iinfo(dtype)
    for value in numbers:
        fits = not isinstance(value, int | float) or limits.min <= value <= limits.max
        require(fits, f"{value} does not fit {dtype}")
