"""The whole network from the input on, as a call of the engine runs it: bits that differ."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from biper_engine import bits as contract
from biper_engine.conversion.segments import segment_row
from biper_engine.conversion.verify_report import SegmentReport
from biper_engine.converted import ConvertedNetwork
from biper_engine.engine import Engine
from biper_engine.graph.reading import output_values
from biper_engine.graph.signature import Signature

__all__ = ["EndToEnd"]


class EndToEnd:
    """Runs an engine whose results are the packed maps that enter its binary layers.

    It runs as the engine does, by native programs too, whose float sums have another order than
    PyTorch's: a value at its threshold can become another bit in a call of the engine alone.

    Args:
        engine: the engine.
        lowered: a graph that equals the engine's, with `meta["conv"]` or `meta["product"]` at
            binary layers.
    """

    def __init__(self, engine: Engine, lowered: fx.GraphModule) -> None:
        nodes = lowered.graph.nodes
        self._layers = [node for node in nodes if "conv" in node.meta or "product" in node.meta]
        maps = list(dict.fromkeys(str(node.args[0]) for node in self._layers))
        self._engine = _with_results(engine, lowered, maps) if maps else None

    def count(
        self,
        batch: Sequence[Tensor],
        layer_inputs: Mapping[str, Tensor],
        segments: dict[str, SegmentReport],
        *,
        counted: bool,
    ) -> None:
        """Add to the rows how many bits there are, and how many differ from the model's.

        Args:
            batch: flat inputs.
            layer_inputs: the true packed map that enters each binary layer, by node name.
            segments: rows by name.
            counted: whether the bits are also those of the images that the report is about.
        """
        if self._engine is None:
            return
        found, _ = self._engine(*batch)
        for node in self._layers:
            bits, wanted = found[str(node.args[0])], layer_inputs[node.name]
            conv = node.meta.get("conv")
            channels: Any = node.kwargs["channels"] if conv is None else conv.geometry.in_channels
            row = segment_row(segments, node)
            count = wanted.numel() // max(1, wanted.shape[-1]) * channels
            row.run_bits += count
            row.input_bits += count if counted else 0
            row.input_bits_differ += contract.count_different(bits, wanted)


def _with_results(engine: Engine, lowered: fx.GraphModule, names: list[str]) -> Engine:
    """Return an engine of the same graph that returns a dict of these values.

    It also returns what the engine does: operators that nobody needs would leave the programs.
    """
    module = copy.deepcopy(lowered)
    named = {node.name: node for node in module.graph.nodes}
    results = output_values(module.graph)
    module.graph.output_node().args = ((*(named[name] for name in names), *results),)
    module.recompile()
    inputs = engine.signature.inputs
    signature = Signature(
        in_spec=pytree.tree_structure(((0,) * len(inputs), {})),
        out_spec=pytree.tree_structure([dict.fromkeys(names, 0), [0] * len(results)]),
        inputs=inputs,
    )
    return Engine(ConvertedNetwork(module, signature=signature, report=engine.report))
