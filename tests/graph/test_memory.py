"""Results have their own memory."""

import torch

from biper_engine.graph.memory import create_on, isolate_outputs
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


def test_created_tensors_are_made_on_the_device() -> None:
    g = GraphBuilder()
    x = g.input("x")
    size = g.call("size", _aten.sym_size.int, x, 0)
    zeros = g.call("zeros", _aten.zeros.default, [size, 3], device=torch.device("cpu"))
    positions = g.call("positions", _aten.arange.default, size)
    column = g.call("column", _aten.unsqueeze.default, positions, 1)
    total = g.call("sum", _aten.add.Tensor, g.call("y", _aten.add.Tensor, x, zeros), column)
    module = g.module(
        g.call("like", _aten.mul.Tensor, total, g.call("ones", _aten.ones_like.default, x))
    )
    for device in ("cpu", "meta", "cpu"):
        create_on(module, torch.device(device))
        (result,) = module(torch.ones(2, 3, device=device))
        assert result.device.type == device
    assert torch.equal(result, torch.tensor([[1.0] * 3, [2.0] * 3]))
