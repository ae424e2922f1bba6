"""Ranges: the sign of a value, if it has one."""

from typing import Any

import pytest
import torch

from biper_engine.conversion.ranges import nonnegative
from tests.networks_by_hand import GraphBuilder

_aten = torch.ops.aten


@pytest.mark.parametrize(
    ("clamp", "limits", "wanted"),
    [
        (_aten.clamp.default, (None, 1.0), True),
        (_aten.clamp.default, (None, -1.0), False),
        (_aten.clamp.default, (0.5, -1.0), False),
        (_aten.hardtanh.default, (), True),
        (_aten.hardtanh.default, (-3.0, -2.0), False),
    ],
)
def test_a_clamp_of_what_is_never_negative(clamp: Any, limits: Any, wanted: bool) -> None:
    g = GraphBuilder()
    relu = g.call("relu", _aten.relu.default, g.input("x"))
    assert nonnegative(relu)
    assert nonnegative(g.call("clamp", clamp, relu, *limits)) is wanted
