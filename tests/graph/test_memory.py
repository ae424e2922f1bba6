"""Results have their own memory."""

import torch

from biper_engine.graph.memory import isolate_outputs
from biper_engine.graph.reading import output_values
from tests.networks_by_hand import GraphBuilder

_aten = torch.ops.aten


def test_only_outputs_that_alias_inputs_or_constants_are_cloned() -> None:
    g = GraphBuilder()
    x = g.input("x")
    fresh = g.call("fresh", _aten.relu.default, x)
    view = g.call("view", _aten.permute.default, fresh, [0, 2, 1])
    alias = g.call("alias", _aten.permute.default, x, [0, 2, 1])
    module = g.module(fresh, view, alias, None)
    isolate_outputs(module)
    isolate_outputs(module)
    fresh_out, view_out, alias_out, nothing = output_values(module.graph)
    assert (fresh_out, view_out, nothing) == (fresh, view, None)
    assert alias_out.target is _aten.clone.default
    assert sum(node.target is _aten.clone.default for node in module.graph.nodes) == 1
