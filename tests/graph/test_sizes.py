"""Sizes that grow with the batch: only what holds for every number of images is accepted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from biper_engine.graph import BATCH as N
from biper_engine.graph import ImagesSize, MisfitError, Value
from biper_engine.graph.sizes import divided, floored, product, remainder, require_small
from biper_engine.graph.values import broadcast


def test_sizes_are_computed() -> None:
    assert N + N == 2 * N == N * 2 == ImagesSize(2)
    assert 3 + N - 1 == N + 2
    assert (N + 3) - N == 3
    assert (4 * N + 2) // 2 == 2 * N + 1
    assert divided(6 * N, 2 * N) == 3
    assert product([2, N, 3]) == 6 * N
    assert N >= 1
    assert 3 * N > 2
    assert 2 * N >= N
    assert not N + 1 >= N + 2
    assert floored(2 * N + 3, 2) == N + 1
    assert floored(2 * N, N) == 2
    assert remainder(4 * N + 3, 2) == 1
    assert str(2 * N + 1) == "2 * N + 1"


@pytest.mark.parametrize(
    "compute",
    [
        *(lambda: N * N, lambda: N - 1, lambda: 5 - N, lambda: N >= 2, lambda: N > 1),
        *(lambda: divided(N, 2), lambda: divided(N + 1, N), lambda: divided(3, N)),
        *(lambda: divided(4, 0), lambda: N * (1 << 31), lambda: product([N, N])),
        *(lambda: broadcast((N, 3), (61, 3)), lambda: broadcast((N,), (2 * N,))),
        *(lambda: floored(3 * N, 2), lambda: remainder(3 * N, 2), lambda: remainder(N, N)),
        *(lambda: N >= 2 * N - 1, lambda: 2 * N >= N + 2),
        lambda: require_small([N, 1 << 16, 1 << 16]),
    ],
)
def test_what_depends_on_the_batch_is_refused(compute: Callable[[], Any]) -> None:
    with pytest.raises(MisfitError):
        compute()


def test_a_size_of_the_batch_is_no_number() -> None:
    assert N != 1
    assert broadcast((N, 3), (1, 1)) == (N, 3)
    with pytest.raises(MisfitError, match="dimensions"):
        Value(torch.float32, (1,) * 9)
