"""A residual with fewer channels than the output, which repeats: the same bytes everywhere."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine.runtime import NativePlan
from tests.conversion.comparison import Functional, converted, images_of
from tests.conversion.test_merge import halves, layers
from tests.runtime.plans import one_by_one
from tests.shared import USABLE_ISAS

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.mark.some(2)
@pytest.mark.parametrize("channels", [32, 64, 6])
def test_a_residual_that_repeats_gives_the_same_bytes(channels: int) -> None:
    from biper_engine import _cpu

    def run(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([half + x for half in halves(s, x)], 1)
        y = s.beta(s.prelu(s.alpha(joined)))
        return y, s.c(y)

    engine, _, _ = converted(lambda: Functional(run, **layers(channels)), (channels, 9, 9))
    images = images_of((channels, 9, 9), 3)
    wanted = one_by_one(engine, images)
    before = _cpu.isa()
    for isa in USABLE_ISAS:
        _cpu.select_isa(isa)
        try:
            own = copy.deepcopy(engine)  # made for the instruction set
            native = own._get_plan().native
            assert isinstance(native, NativePlan)
            assert len(native.steps) == 3 + (channels % 32 != 0)  # binarize, two convolutions
            assert all(map(torch.equal, own(images), wanted))
        finally:
            _cpu.select_isa(before)
