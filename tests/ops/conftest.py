"""Fixtures for the tests of operators: random operands, and an exact fused multiply-add."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine.geometry import Conv2dGeometry
from biper_engine.ops.backends import by_name, refusal
from tests.ops.matrix import Operands


@pytest.fixture
def need(run: tuple[str, torch.device]) -> Callable[..., None]:
    """Return a function that skips, with the backend's reason, where it cannot run a call."""

    def skip_unless_supported(
        op: str, geometry: Conv2dGeometry | None = None, steps: frozenset[str] = frozenset()
    ) -> None:
        reason = refusal(by_name(run[0]), op, geometry, run[1], steps)
        if reason is not None:
            pytest.skip(f"{run[0]} cannot run {op}: {reason}")

    return skip_unless_supported


@pytest.fixture(scope="session")
def operands() -> type[Operands]:
    """Return the class that makes operands of a geometry."""
    return Operands


@pytest.fixture(scope="session")
def same_bytes() -> Callable[[Tensor, Tensor], bool]:
    """Return a comparison of float tensors that tells -0.0 from 0.0."""

    def compare(a: Tensor, b: Tensor) -> bool:
        integer: Any = torch.int32 if a.dtype == torch.float32 else torch.int16
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a.cpu().contiguous().view(integer), b.cpu().contiguous().view(integer))

    return compare
