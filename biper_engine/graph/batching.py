"""Whether a network computes every image of a batch independently.

If so, rows may be added to a batch and left out of its results, and nothing else changes.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from biper_engine.graph.inference import network_values
from biper_engine.graph.operators import operator_of
from biper_engine.graph.reading import output_values
from biper_engine.graph.rows import is_batch
from biper_engine.graph.signature import InputSpec
from biper_engine.graph.sizes import MisfitError

__all__ = ["images_are_independent"]


def images_are_independent(module: fx.GraphModule, inputs: Sequence[InputSpec] | None) -> bool:
    """Whether every result is a batch whose rows depend only on the same row of the inputs.

    False if this is not known: for operators that are not declared, and for values whose first
    dimension is not the batch.

    Args:
        module: a converted network.
        inputs: its inputs; None if they are not known.
    """
    if not inputs or any(spec.shape[:1] != (None,) for spec in inputs):
        return False
    try:
        values = network_values(module, inputs)
    except MisfitError:  # an input that is too large
        return False
    returned = output_values(module.graph)
    return all(isinstance(x, fx.Node) and x.op != "get_attr" for x in returned) and all(
        is_batch(values[node]) and _keeps_rows(node, values)
        for node in module.graph.nodes
        if node.op == "call_function"
    )


def _keeps_rows(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    if node.target is operator.getitem:
        return True
    declared = operator_of(node)
    if declared is None:
        return False
    given = fx.node.map_arg(declared.named(node), values.__getitem__)
    return declared.rows(declared.complete(given), values[node])
