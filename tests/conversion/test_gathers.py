"""Gathers: maps that are written slice by slice with parts of one map."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from biper_engine.conversion.capture import capture
from biper_engine.conversion.simplify import simplify
from tests.conversion.comparison import Functional, images_of


def rolled_by_hand(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape)
    y[:, 1:] = x[:, :-1]
    y[:, :1] = x[:, -1:]
    return y


def with_a_rim_of_zeros(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape)
    y[:, :, 1:] = x[:, :, 1:]
    return y


def transposed_corner(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :, :2, 2:4] = x[:, :, 2:4, :2]
    return y


CASES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "circular padding": (lambda x: F.pad(x, (1, 2, 3, 0), mode="circular"), True),
    "circular padding in one dimension": (
        lambda x: F.pad(x.flatten(2), (4, 1), mode="circular"),
        True,
    ),
    "rolled by hand": (rolled_by_hand, True),
    "a rim of zeros": (with_a_rim_of_zeros, False),
    "a corner from elsewhere": (transposed_corner, False),
}


@pytest.mark.some(2)
@pytest.mark.parametrize("name", CASES)
def test_writes_of_parts_of_one_map_become_an_index(name: str) -> None:
    run, indexed = CASES[name]
    x = images_of((4, 5, 6))
    graph_module = capture(Functional(lambda _, x: run(x)), (x,)).graph_module
    simplify(graph_module)
    targets = {str(node.target) for node in graph_module.graph.nodes}
    assert ("aten.index_select.default" in targets) is indexed
    assert ("aten.slice_scatter.default" in targets) is not indexed
    for batch in (x, x[:1]):
        (got,) = fx.Interpreter(graph_module).run(batch)
        assert torch.equal(got, run(batch))
