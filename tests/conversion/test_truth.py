"""The values of the model that the captured graph follows."""

import pytest
import torch
from torch import Tensor

from biper_engine.conversion.truth import _ANOTHER_ORDER, _error, _Sampled


def recorded(shape: tuple[int, ...]) -> list[Tensor]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rounded = x * (1 + 1e-6)
    last = x.clone()
    last.reshape(-1)[-1:] += 1.0
    infinite, missing = x.clone(), x.clone()
    infinite.reshape(-1)[:1] = float("inf")
    missing.reshape(-1)[:1] = float("nan")
    return [x, rounded, x + 1, -x, last, infinite, missing, torch.zeros(shape), x * 1e-30]


@pytest.mark.parametrize("shape", [(), (1,), (63,), (65,), (2, 3, 40, 50), (0, 4)])
def test_no_value_that_is_near_is_left_out(shape: tuple[int, ...]) -> None:
    tensors = recorded(shape)
    sampled = _Sampled(tensors)
    for value in tensors:
        found = [id(tensor) for tensor in sampled.possibly_near(value)]
        near = [id(one) for one in tensors if _error(one, value) <= _ANOTHER_ORDER]
        assert set(near) <= set(found)


def test_most_other_values_are_left_out() -> None:
    tensors = [torch.randn(4, 5, 6) for _ in range(50)]
    assert len(_Sampled(tensors).possibly_near(tensors[7])) == 1
