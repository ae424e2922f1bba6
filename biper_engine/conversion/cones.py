"""Cones: the elementwise operators between a value and its sources, as a function of numbers."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from biper_engine.conversion.ranges import created_number
from biper_engine.graph.operator import Numbers
from biper_engine.graph.operators import numbers_of
from biper_engine.graph.reading import constant, evaluate, is_call, shape

__all__ = ["EXTREME", "Cone", "NotElementwiseError", "from_key", "probes_of", "to_key"]

aten = torch.ops.aten

MAX_CONE = 64
EXTREME = 1e30

_CREATED = (aten.full.default, aten.scalar_tensor.default, aten.ones.default, aten.zeros.default)


class NotElementwiseError(Exception):
    """A cone's value at one place depends on more than its source there."""


class Cone:
    """The elementwise operators between a value and its sources."""

    def __init__(self, graph_module: fx.GraphModule, top: fx.Node, axis: int) -> None:
        self._graph_module = graph_module
        self.top = top
        self.axis = axis
        self.rank = len(shape(top))
        self.channels = int(shape(top)[axis])
        self.floor: float | None = None  # the least value of the source, if it is known
        self.members: list[fx.Node] = []
        self._frontier: list[fx.Node] = [top]

    @property
    def source(self) -> fx.Node | None:
        """The single input of the cone, or None if it has several."""
        return self._frontier[0] if len(self._frontier) == 1 else None

    def grow(self) -> bool:
        """Add the last operator of the frontier to the cone, if possible."""
        latest = max(self._frontier, default=None)  # nodes are ordered as in the graph
        if latest is None or len(self.members) >= MAX_CONE:
            return False
        if numbers_of(latest) is not Numbers.ELEMENTWISE:
            return False
        self._frontier.remove(latest)
        self.members.append(latest)
        for operand in latest.all_input_nodes:
            if self._is_constant(operand) or operand in self._frontier or operand in self.members:
                continue
            self._frontier.append(operand)
        return bool(self._frontier)

    def _is_constant(self, node: fx.Node) -> bool:
        return (
            constant(self._graph_module, node) is not None
            or is_call(node, *_CREATED)
            or _is_size(node)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate on probes [P, C]; return [P, C] float64."""
        assert self.source is not None
        layout = [x.shape[0]] + [1] * (self.rank - 1)
        layout[self.axis] = self.channels
        if self.floor is not None:
            x = x.clamp(min=self.floor)
        values = {self.source: x.to(self.source.meta["val"].dtype).reshape(layout)}
        for node in sorted(self.members):
            for operand in node.all_input_nodes:
                if operand not in values:
                    values[operand] = self._constant(operand)
            try:
                values[node] = evaluate(node, values)
            except (RuntimeError, TypeError, ValueError) as cause:
                raise NotElementwiseError from cause
        result = values[self.top]
        if list(result.shape) != layout:
            raise NotElementwiseError
        return result.reshape(x.shape).double()

    def _constant(self, node: fx.Node) -> Tensor:
        held = constant(self._graph_module, node)
        if held is not None:
            return held
        if is_call(node, aten.scalar_tensor.default):
            return evaluate(node, {})
        number = created_number(node)
        if number is None:
            raise NotElementwiseError
        return torch.tensor(number, dtype=node.meta["val"].dtype)

    def extended(self) -> Cone | None:
        """Return a larger cone that again has a single source, or None."""
        larger = Cone(self._graph_module, self.top, self.axis)
        larger.members, larger._frontier = list(self.members), list(self._frontier)
        while larger.grow():
            if larger.source is not None:
                return larger
        return None


def _is_size(node: fx.Node) -> bool:
    return is_call(node, aten.sym_size.int)


def probes_of(channels: int) -> Tensor:
    """Return numbers of all magnitudes in order, the same for every channel, [P, C]."""
    powers = torch.exp2(torch.arange(-148, 99, 3, dtype=torch.float64)).float()
    grid = torch.linspace(-8, 8, 257)
    positive = torch.cat([powers, torch.tensor([EXTREME])])
    column = torch.cat([-positive, torch.tensor([-0.0, 0.0]), positive, grid]).sort().values
    return column[:, None].expand(-1, channels)


def to_key(values: Tensor) -> Tensor:
    """Map float32 to int64 in numeric order; -0.0 is -1 and 0.0 is 0."""
    raw = values.float().contiguous().view(torch.int32).long()
    return torch.where(raw < 0, -(raw & 0x7FFFFFFF) - 1, raw)


def from_key(keys: Tensor) -> Tensor:
    """Return the float32 numbers of keys; see `to_key`."""
    raw = torch.where(keys < 0, (-(keys + 1)) - (1 << 31), keys)
    return raw.to(torch.int32).view(torch.float32)
