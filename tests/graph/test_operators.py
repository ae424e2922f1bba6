"""Declared operators: the declared result of a call is PyTorch's, or the call is refused."""

import contextlib
import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine.graph import BATCH, OPERATORS, MisfitError, Operator, Value
from biper_engine.graph.operator import Numbers
from biper_engine.graph.operators import numbers_of
from biper_engine.graph.values import ANY
from tests.graph.calls import CALLS, Flowing, calls_of, concrete, told
from tests.networks_by_hand import GraphBuilder

OVERLOADS = {
    name: operator
    for name, operator in OPERATORS.items()
    if isinstance(operator.target, torch._ops.OpOverload)
}
CALLED = list(dict.fromkeys(name for name, _ in CALLS))


def described(argument: Any) -> Any:
    if isinstance(argument, Flowing):
        return argument.value()
    if isinstance(argument, Tensor):
        return Value.of_constant(argument)
    return [described(item) for item in argument] if isinstance(argument, list) else argument


def passed(argument: Any, images: int) -> Any:
    if isinstance(argument, Flowing):
        return argument.tensor(images)
    if isinstance(argument, list):
        return [passed(item, images) for item in argument]
    return concrete(argument, images)


def run(operator: Operator, arguments: Mapping[str, Any], images: int) -> Any:
    named = {name: passed(value, images) for name, value in arguments.items()}
    if operator.name not in OVERLOADS:
        return operator.target(*named.values())
    return operator.target(**named)


def facts(result: Any, images: int) -> Any:
    """Return dtype and shape of a result, for so many images."""
    if isinstance(result, tuple | list):
        return [facts(item, images) for item in result]
    if isinstance(result, Tensor | Value):
        return result.dtype, [concrete(size, images) for size in result.shape]
    return concrete(result, images)


def require_equal(got: Any, said: Any, images: int) -> None:
    """Require a result as declared; the last of several may be left out of a declaration."""
    if isinstance(said, tuple):
        got = list(got)[: len(said)]
    assert facts(got, images) == facts(said, images)


def test_every_operator_is_called() -> None:
    assert set(OPERATORS) - {name for name, _ in CALLS} == set()


@pytest.mark.parametrize("name", CALLED)
def test_a_result_is_what_pytorch_gives(name: str) -> None:
    operator = OPERATORS[name]
    for arguments in calls_of(name):
        with told(arguments):
            said = operator.infer({key: described(value) for key, value in arguments.items()})
            for images in (1, 2, 5):
                require_equal(run(operator, arguments, images), said, images)


def _with_dtype(argument: Any, dtype: torch.dtype) -> Any:
    """Return an argument with another dtype in the place of float32."""
    if isinstance(argument, list):
        return [_with_dtype(item, dtype) for item in argument]
    if isinstance(argument, Flowing) and argument.dtype == torch.float32:
        return Flowing(argument.shape, dtype)
    if isinstance(argument, Tensor) and argument.dtype == torch.float32:
        return argument.to(dtype)
    return argument


@pytest.mark.parametrize("name", CALLED)
def test_every_dtype_runs_or_is_refused(name: str) -> None:
    for arguments, dtype in itertools.product(calls_of(name), ANY):
        changed = {key: _with_dtype(value, dtype) for key, value in arguments.items()}
        with told(changed), contextlib.suppress(MisfitError):
            said = OPERATORS[name].infer({key: described(value) for key, value in changed.items()})
            require_equal(run(OPERATORS[name], changed, 2), said, 2)


_FOREIGN: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 1 << 40, 0.5, math.inf, math.nan, "words", {}, torch.float32),
    *(BATCH, Value(torch.float32, (BATCH, 4)), Value(torch.bool, ()), Value(torch.int64, (2, 3))),
)


@pytest.mark.parametrize("name", CALLED)
def test_any_argument_fits_or_is_refused(name: str) -> None:
    for arguments in calls_of(name):
        known = {key: described(value) for key, value in arguments.items()}
        for argument, value in itertools.product(OPERATORS[name].arguments, _FOREIGN):
            with told({**known, argument: value}):
                infer_with(OPERATORS[name], known, argument, value)


def infer_with(operator: Operator, known: dict[str, Any], argument: str, value: Any) -> None:
    """Give an argument a value, alone and in lists."""
    kept = known.get(argument)
    count = len(kept) if isinstance(kept, list) else 2
    for given in (value, [], [value], [value] * count, [*[1] * (count - 1), value]):
        with contextlib.suppress(MisfitError):
            operator.infer({**known, argument: given})


def test_arguments_are_those_of_the_overload() -> None:
    for name, operator in OVERLOADS.items():
        schema = operator.target._schema
        needed = {a.name for a in schema.arguments if not a.has_default_value()}
        assert needed <= set(operator.arguments) <= {a.name for a in schema.arguments}, name
        assert not schema.is_mutable, name


def test_every_overload_has_one_name() -> None:
    targets = [operator.target for operator in OPERATORS.values()]
    assert len(set(targets)) == len(targets)


_KEPT = (Numbers.MOVED, Numbers.LARGEST, Numbers.JOINED, Numbers.SPLIT)
KEEPING = [name for name in CALLED if OPERATORS[name].numbers in _KEPT]


def _numbers(value: Any) -> set[float]:
    if isinstance(value, tuple | list):
        return set().union(*map(_numbers, value))
    return set(value.flatten().tolist())


@pytest.mark.parametrize("name", KEEPING)
def test_numbers_come_from_the_operands_where_the_declaration_says_so(name: str) -> None:
    for arguments in calls_of(name):
        named = {key: passed(value, 2) for key, value in arguments.items()}
        first = next(iter(named.values()))
        with told(arguments):
            assert _numbers(OPERATORS[name].target(**named)) <= _numbers(first)


def test_captured_operators_are_told_apart_by_how_their_numbers_come() -> None:
    aten, g = torch.ops.aten, GraphBuilder()
    a = g.input("a")
    wanted = {
        aten.sign.default: Numbers.ELEMENTWISE,
        aten.softshrink.default: Numbers.ELEMENTWISE,  # which files do not hold
        aten.flip.out: Numbers.MOVED,  # another overload than the declared one
        aten.max_pool2d.default: Numbers.LARGEST,
        aten.cat.default: Numbers.JOINED,
        aten.unbind.int: Numbers.SPLIT,
        aten.log.default: None,
    }
    assert {t: numbers_of(g.call("call", t, a)) for t in wanted} == wanted
    assert numbers_of(a) is None
