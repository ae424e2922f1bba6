"""Native steps: which operators a program of `csrc/cpu` can run, and how they are added to one.

A step stands for one operator or for several: a float convolution takes the max pool, the clamp and
the bits behind it along, an average pool the zero channels, a sum its clamp. An operator may take
several steps, and one that only shows numbers in another form takes none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from biper_engine.graph.operator import Operator
from biper_engine.graph.operators import operator_of
from biper_engine.graph.reading import arguments
from biper_engine.graph.rows import elementwise
from biper_engine.graph.shapes import result_without_data
from biper_engine.runtime import (
    steps_arithmetic,
    steps_binary,
    steps_joins,
    steps_maps,
    steps_matrices,
    steps_moves,
    steps_products,
    steps_repeats,
    steps_rows,
)
from biper_engine.runtime.batch_moves import back, moved_arguments, moves_batch, to_front
from biper_engine.runtime.placement import Placed
from biper_engine.runtime.runs import RunMaps, Unsupported

__all__ = ["RunBuilder"]

Handler = Callable[[RunMaps, fx.Node, dict[str, Any]], None]

_HANDLERS: dict[str, Handler] = {
    **steps_binary.HANDLERS,
    **steps_maps.HANDLERS,
    **steps_products.HANDLERS,
    **steps_matrices.HANDLERS,
    **steps_rows.HANDLERS,
    **steps_arithmetic.HANDLERS,
    **steps_moves.HANDLERS,
    **steps_repeats.HANDLERS,
    **steps_joins.HANDLERS,
}
"""The native step of each operator that has one, by the name of its declaration."""


class RunBuilder(RunMaps):
    """Adds operators to a program, step by step."""

    def add(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Add a node, and those behind it that its step takes along.

        Returns:
            All nodes that were added.

        Raises:
            Unsupported: the node has no step.
        """
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            self.set(node, self._values[source][index])
            self.nodes.append(node)
            return (node,)
        declared = operator_of(node)
        if declared is None:
            raise Unsupported("has no native step")
        if self._compute_constant(node):
            return (node,)
        handler = _HANDLERS.get(declared.name)
        if handler is None:
            raise Unsupported("has no native step")
        inputs, steps = len(self.inputs), len(self.steps)
        self._node, self._expected = node, result_without_data(node, self._value_of)
        try:
            batch = self._batch_of(node) if moves_batch(declared) else 0
            if batch:
                self._add_moved(node, declared, handler, batch)
            else:
                handler(self, node, arguments(node))
            self._require_expected(node)
        except Unsupported:
            while len(self.inputs) > inputs and len(self.steps) == steps:
                self.inputs.popitem()
            self._values.pop(node, None)
            raise
        found = dict.fromkeys([node, *(x for step in self.steps[steps:] for x in step.nodes)])
        self.nodes.extend(found)
        return tuple(found)

    def _batch_of(self, node: fx.Node) -> int:
        """Return the dimension of an operator's operands, broadcast together, that is the batch."""
        values = [self._values.get(x) for x in node.all_input_nodes]
        operands = [x for x in values if isinstance(x, Placed) and x.batch is not None]
        rank = max((len(x.sizes) for x in operands), default=0)
        return max((rank - len(x.sizes) + (x.batch or 0) for x in operands), default=0)

    def _add_moved(self, node: fx.Node, declared: Operator, handler: Handler, batch: int) -> None:
        """Add a node with the batch of its operands moved to the front; see `batch_moves`."""
        values, computed, expected = dict(self._values), dict(self._computed), self._expected
        sources = {x: self._operand_of(x) for x in node.all_input_nodes}
        rank = max(x.dim() if isinstance(x, Tensor) else len(x.sizes) for x in sources.values())
        named, after = moved_arguments(declared, arguments(node), batch, rank)
        held = declared.rows is not elementwise  # weights, which have no batch
        for source, x in sources.items():
            if isinstance(x, Placed):
                self._values[source] = to_front(x, batch, rank)
            elif not held:
                self._computed[source] = to_front(x, batch, rank)
        try:
            self._expected = expected.movedim(after, 0)
            handler(self, node, named)
            made = {x: self._values[x] for x in self._values if x not in values}
        finally:
            self._values, self._computed, self._expected = values, computed, expected
        for result, x in made.items():
            if not isinstance(x, Placed):
                raise Unsupported("has several results")
            self._values[result] = back(self.settled(x), after)

    def _operand_of(self, source: fx.Node) -> Placed | Tensor:
        """Return an operand of the node at work: a value of the run, or a constant."""
        is_constant = source.op == "get_attr" or source in self._computed
        if is_constant and source not in self._values:
            return self.tensor(source)
        return self.settled(self.placed(source))

    def _compute_constant(self, node: fx.Node) -> bool:
        """Compute a node's value now if it comes from constants alone; say whether it does."""
        values: dict[fx.Node, Tensor] = {}
        for source in node.all_input_nodes:
            tensor = self._computed.get(source)
            if source.op == "get_attr":
                tensor = self.tensor(source, any_dtype=True)
            if tensor is None:
                return False
            values[source] = tensor
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        assert callable(node.target)
        made = node.target(*args, **kwargs)
        if not isinstance(made, Tensor):
            return False
        self._computed[node] = made
        self.nodes.append(node)
        return True

    def _require_expected(self, node: fx.Node) -> None:
        """Require the dtypes and shapes that the declarations say."""
        expected, made = self._expected, self._values.get(node)
        if made is None:  # what follows it is made with it
            return
        pairs = zip(*map(_tuple_of, (self.value(node), expected)), strict=False)
        for found, wanted in pairs:
            if found is not None and (
                not isinstance(wanted, Tensor)
                or (found.dtype, found.shape) != (wanted.dtype, wanted.shape)
            ):
                form = None if wanted is None else f"{wanted.dtype} {list(wanted.shape)}"
                raise Unsupported(f"gives {form}, not {found.dtype} {list(found.shape)}")


def _tuple_of(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
