"""Chains: reshapes and permutations in a row become at most three, with the same value."""

import random

import pytest
import torch
from torch import Tensor, fx, nn

from biper_engine.conversion.capture import capture
from biper_engine.conversion.simplify import simplify
from tests.conversion.comparison import Functional, images_of


def random_chain(seed: int) -> list[tuple[str, list[int]]]:
    """Return reshapes and permutations of a batch of [4, 6, 10] in random order."""
    choice = random.Random(seed)
    sizes = [4, 6, 10]
    chain: list[tuple[str, list[int]]] = []
    for _ in range(choice.randint(2, 6)):
        if choice.random() < 0.5:
            order = [0, *choice.sample(range(1, len(sizes) + 1), len(sizes))]
            sizes = [sizes[dim - 1] for dim in order[1:]]
            chain.append(("permute", order))
            continue
        at = choice.randrange(len(sizes))
        divisors = [d for d in range(1, sizes[at] + 1) if sizes[at] % d == 0]
        part = choice.choice(divisors)
        split = [*sizes[:at], part, sizes[at] // part, *sizes[at + 1 :]]
        join = choice.randrange(len(split) - 1)
        sizes = [*split[:join], split[join] * split[join + 1], *split[join + 2 :]]
        chain.append(("reshape", [-1, *sizes]))
    return chain


@pytest.mark.some(8)
@pytest.mark.parametrize("seed", range(40))
def test_a_random_chain_keeps_its_value(seed: int) -> None:
    chain = random_chain(seed)

    def run(self: nn.Module, x: Tensor) -> Tensor:
        for name, how in chain:
            x = getattr(x, name)(how)
        return x.abs()

    images = images_of((4, 6, 10))
    graph_module = capture(Functional(run), (images,)).graph_module
    simplify(graph_module)
    calls = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    assert len(calls) <= 4
    for count in (1, 3, 4):
        (got,) = fx.Interpreter(graph_module).run(images[:count])
        assert torch.equal(got, run(Functional(run), images[:count]))
