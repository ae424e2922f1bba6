from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine.bench.rivals.recipe import Recipe, rival_of

IMAGES = torch.randn(3, 3, 10, 9, generator=torch.Generator().manual_seed(4))


def recipe(make: Callable[[], Any]) -> Recipe:
    return Recipe(name="r", how="somehow", modules=(), make=make, wanted=lambda x: x, share=1.0)


class Doubling:
    def __call__(self, images: Tensor) -> Tensor:
        return 2 * images

    def bind(self, images: Tensor) -> Callable[[], Tensor]:
        return lambda: 2 * images

    def kernels(self) -> dict[str, int]:
        return {"Multiply fast": 1}


@pytest.mark.parametrize("error", [RuntimeError, ValueError, OSError])
def test_a_rival_that_fails_gives_its_reason(error: type[Exception]) -> None:
    def fail() -> Any:
        raise error("no such operator\nand much more")

    assert rival_of(recipe(fail), IMAGES).reason == "no such operator"


def test_a_rival_with_other_answers_is_not_run() -> None:
    found = rival_of(recipe(Doubling), IMAGES)
    assert found.call is None
    assert "agrees with the float twin on 0 of 9 images only" in found.reason


def test_a_rival_has_the_kernels_that_its_runtime_tells_of() -> None:
    doubled = replace(recipe(Doubling), wanted=lambda x: 2 * x)
    found = rival_of(doubled, IMAGES)
    assert found.agreed == (9, 9)
    assert found.kernels == {"Multiply fast": 1}
