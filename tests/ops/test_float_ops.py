import pytest
import torch

from biper_engine.ops.float_ops import FLOAT_OPS


@pytest.mark.parametrize("name", FLOAT_OPS)
def test_arguments_are_those_of_the_overload(name: str) -> None:
    op = FLOAT_OPS[name]
    assert isinstance(op.target, torch._ops.OpOverload)
    known = [argument.name for argument in op.target._schema.arguments]
    assert [argument for argument in op.arguments if argument not in known] == []
    assert len(set(op.arguments)) == len(op.arguments)


@pytest.mark.parametrize("name", FLOAT_OPS)
def test_arguments_without_default_are_all_listed(name: str) -> None:
    op = FLOAT_OPS[name]
    needed = [a.name for a in op.target._schema.arguments if not a.has_default_value()]
    assert [argument for argument in needed if argument not in op.arguments] == []


@pytest.mark.parametrize("name", FLOAT_OPS)
def test_operators_return_one_tensor_and_change_nothing(name: str) -> None:
    schema = FLOAT_OPS[name].target._schema
    assert len(schema.returns) == 1
    assert not schema.is_mutable


def test_every_overload_has_one_name() -> None:
    targets = [op.target for op in FLOAT_OPS.values()]
    assert len(set(targets)) == len(targets)
