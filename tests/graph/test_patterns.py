"""Patterns: the meaning of operators, and the operators after a convolution."""

import math
from typing import Any

import pytest
import torch
from torch import fx

from biper_engine.graph.patterns import clamp_limits, only_user, per_channel, tail_of, zero_pad
from tests.networks_by_hand import GraphBuilder

_aten, _biper = torch.ops.aten, torch.ops.biper
INF = math.inf


def one(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    g = GraphBuilder()
    return g.call("one", target, g.input("x"), *args, **kwargs)


@pytest.mark.parametrize(
    ("node", "limits"),
    [
        (one(_aten.relu.default), (0.0, INF)),
        (one(_aten.hardtanh.default), (-1.0, 1.0)),
        (one(_aten.hardtanh.default, -2, max_val=3), (-2.0, 3.0)),
        (one(_aten.clamp.default, None, 4), (-INF, 4.0)),
        (one(_aten.clamp.default, INF), (INF, INF)),
        (one(_aten.sigmoid.default), None),
    ],
    ids=str,
)
def test_clamps_in_every_spelling(node: fx.Node, limits: Any) -> None:
    assert clamp_limits(node) == limits


def test_pads_of_zeros_that_add() -> None:
    pad = _aten.constant_pad_nd.default
    assert zero_pad(one(pad, [1, 2, 3, 4])) == [1, 2, 3, 4]
    assert zero_pad(one(pad, [1, 2], 0.0)) == [1, 2]
    assert zero_pad(one(pad, [1, -2])) is None
    assert zero_pad(one(pad, [1, 2], 1)) is None
    assert zero_pad(one(_aten.relu.default)) is None


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (2, [2.0] * 3),
        (torch.tensor(0.5), [0.5] * 3),
        (torch.arange(3).view(3, 1, 1), [0.0, 1.0, 2.0]),
        (torch.arange(3.0).view(1, 3, 1, 1), [0.0, 1.0, 2.0]),
        (torch.arange(3.0), None),  # along the width
        (torch.ones(4, 1, 1), None),
        (torch.ones(1, 1, 3, 1, 1), None),
        (torch.ones(3, 1, 1) * 1j, None),
        (None, None),
    ],
)
def test_operands_that_are_one_number_per_channel(value: Any, wanted: list[float] | None) -> None:
    found = per_channel(value, 3, 4)
    assert (None if found is None else found.tolist()) == wanted


@pytest.mark.parametrize("order", ["pool, clamp", "clamp, pool"])
def test_a_tail_is_a_pool_and_a_clamp_in_either_order_and_the_bits_that_agree(order: str) -> None:
    g = GraphBuilder()
    weight = g.constant("weight", g.normal(4, 3, 3, 3))
    conv = last = g.call("conv", _aten.conv2d.default, g.input("x"), weight)
    for name in order.split(", "):
        options = (_aten.max_pool2d.default, [2, 2]) if name == "pool" else (_aten.relu.default,)
        last = g.call(name, options[0], last, *options[1:])
    g.call("other_clamp", _aten.relu.default, last)
    threshold = g.constant("threshold", g.normal(4))
    bits = [g.call(f"bits{i}", _biper.binarize.default, last, threshold) for i in range(2)]
    g.call("other_bits", _biper.binarize.default, last)
    tail = tail_of(conv)
    assert [node.name for node in tail.nodes] == order.split(", ")
    assert (tail.pool.kernel_size, tail.limits) == ((2, 2), (0.0, INF))
    assert list(tail.bits) == bits
    assert only_user(last) is None
