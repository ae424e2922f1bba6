"""What plans run, and what comes out operator by operator."""

from typing import Any

import torch
from torch import Tensor

from biper_engine.engine import Engine
from biper_engine.graph.reading import interpret
from biper_engine.runtime.cuda_graphs import CudaGraphs


def one_by_one(engine: Engine, *inputs: Tensor) -> tuple[Any, ...]:
    """Run the operators of an engine's graph as torch runs them."""
    with torch.no_grad():
        return interpret(engine.graph_module, inputs, lambda n, a, k: n.target(*a, **k))


def graphs_of(engine: Engine) -> CudaGraphs:
    graphs = engine._get_plan().graphs
    assert graphs is not None
    return graphs


def batches(graphs: CudaGraphs) -> list[int]:
    """Return the captured batches, least recently used first."""
    return [key[0][0][0] for key in graphs.captured]
