"""Reading a graph: running it node by node."""

import pytest
import torch
from torch import fx

from biper_engine.graph.reading import arguments, interpret, packed_map
from tests.networks_by_hand import GraphBuilder, classifier_graph


def test_arguments_are_named_and_have_their_defaults() -> None:
    aten, g = torch.ops.aten, GraphBuilder()
    x = g.input("x")
    clamp = g.call("clamp", aten.clamp.default, x, max=3)
    assert arguments(clamp) == {"self": x, "min": None, "max": 3}
    unbinarize = g.call("floats", torch.ops.biper.unbinarize.default, x, 33)
    assert arguments(unbinarize) == {"bits": x, "channels": 33, "dtype": torch.float32}
    indices = g.call("indices", aten.tril_indices.default, 3, 3)
    assert arguments(indices)["dtype"] == torch.int64
    with pytest.raises(TypeError, match="takes 1 arguments, but a call passes 2"):
        arguments(g.call("relu", aten.relu.default, x, 1))


def test_interpret_visits_every_call_and_returns_the_outputs() -> None:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    module = classifier_graph()
    maps: dict[str, torch.Size] = {}

    def call(node: fx.Node, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        packed = packed_map(node, result)
        if packed is not None:
            maps[node.name] = packed.shape
        return result

    (logits,) = interpret(module, [images], call)
    assert torch.equal(logits, module(images)[0])
    assert maps == {
        "stem_bits": (2, 8, 8, 2),
        "layer1_0": (2, 8, 8, 2),
        "layer1_1": (2, 8, 8, 2),
        "pool": (2, 4, 4, 2),
    }
