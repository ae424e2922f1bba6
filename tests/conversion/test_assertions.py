"""Checks of values: those that only raise or print are left out; others are refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biper_engine
from biper_engine import ConversionError, UnconvertedWarning
from tests.conversion import checks_of_values as checks


class Checked(nn.Module):
    def __init__(self, check: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.check = check

    def forward(self, x: Tensor) -> Tensor:
        checked = self.check(x)
        x = x if checked is None else checked
        return F.linear(torch.sign(x), torch.sign(self.weight))


LEFT_OUT = (
    checks.raises,
    checks.raises_else,
    checks.asserts,
    checks.asks_functions,
    checks.asks_in_a_context,
    checks.prints,
    checks.stops_in_a_debugger,
)
REFUSED = (
    *(
        checks.branches,
        checks.branches_beside,
        checks.raises_at_the_end,
        checks.catches,
        checks.is_caught,
        checks.counts,
        checks.chooses,
    ),
    *(
        checks.prints_or_changes,
        checks.prints_a_change,
        checks.prints_its_calls,
        checks.keeps,
        checks.asks_a_number,
    ),
)


@pytest.mark.some(1)
@pytest.mark.parametrize("check", LEFT_OUT)
def test_a_check_that_computes_nothing_is_left_out(check: Callable[[Tensor], None]) -> None:
    model, x = Checked(check).eval(), torch.randn(2, 16)
    with pytest.warns(UnconvertedWarning, match=r"does not check values .*checks_of_values.py"):
        engine = biper_engine.convert(model, x)
    with torch.no_grad():
        assert torch.equal(engine(x), model(x))
    assert biper_engine.verify(engine, model, x).ok
    with pytest.raises(ConversionError, match="does not check values"):
        biper_engine.convert(model, x, unconverted="raise")


@pytest.mark.parametrize("check", REFUSED)
def test_a_branch_that_may_change_values_is_refused(check: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ConversionError, match=r"leaves the graph.*checks_of_values.py"):
        biper_engine.convert(Checked(check), torch.randn(2, 16))


def test_verify_says_that_the_model_raises() -> None:
    model, x = Checked(checks.raises), torch.randn(2, 16)
    engine = biper_engine.convert(model, x, unconverted="ignore")
    with pytest.raises(ConversionError, match="The model itself fails"):
        biper_engine.verify(engine, model, x + 1000)


def test_a_model_that_refuses_random_numbers_is_checked_on_its_example() -> None:
    model = Checked(checks.only_small)
    with pytest.warns(UnconvertedWarning):
        biper_engine.convert(model, torch.rand(2, 16))
