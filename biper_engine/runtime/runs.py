"""A run of operators as one native program, with its inputs, maps and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.bits import words
from biper_engine.graph.reading import constant, is_call
from biper_engine.graph.shapes import BATCH
from biper_engine.ops.cpu_program import CpuProgram, Map

__all__ = ["NativeRun", "NativeStep", "RunMaps", "Unsupported"]


class Unsupported(Exception):
    """A node without a step; the message says why, with the node as its subject."""


@dataclass(frozen=True)
class NativeStep:
    """One step of a program.

    Attributes:
        nodes: nodes of the graph that the step computes.
        macs: multiply-accumulates on bits for one image, including padded taps; None if none.
    """

    nodes: tuple[fx.Node, ...]
    macs: int | None = None


@dataclass(frozen=True)
class NativeRun:
    """Operators that run as one program.

    Attributes:
        program: takes the values of `inputs`.
        steps: steps in order of execution.
        inputs: nodes outside the run.
        outputs: nodes of the run whose values are returned, with positions in the result.
    """

    program: CpuProgram
    steps: tuple[NativeStep, ...]
    inputs: tuple[fx.Node, ...]
    outputs: dict[fx.Node, int]


class RunMaps:
    """A program under construction, and the values of its maps.

    Args:
        module: a converted network.
        value_of: returns the value of a node outside the run as a tensor without data, for BATCH
            images; None if it is not known.

    Attributes:
        nodes: nodes that the run computes, with views of its maps, in order.
        steps: steps of the program.
        inputs: nodes outside the run, and the maps of their values in the run.
    """

    def __init__(self, module: fx.GraphModule, value_of: Callable[[fx.Node], Any]) -> None:
        self.nodes: list[fx.Node] = []
        self.steps: list[NativeStep] = []
        self.inputs: dict[fx.Node, Map] = {}
        self._module = module
        self._value_of = value_of
        self._program = CpuProgram()
        self._maps: dict[fx.Node, Any] = {}  # Map, or a pair of them
        self._flat: dict[fx.Node, tuple[int, int, int] | None] = {}  # [N, features] values
        self._roots: dict[int, int] = {}  # views, and the maps whose memory they share

    def value(self, node: fx.Node) -> Tensor:
        """Return the value of a node of the run as a tensor without data, for BATCH images."""
        x = self._maps[node]
        if x.packed:
            shape = (BATCH, x.height, x.width, words(x.channels))
            return torch.empty(shape, dtype=torch.int32, device="meta")
        shape = (BATCH, x.channels, x.height, x.width)
        floats = torch.empty(shape, dtype=torch.float32, device="meta")
        return floats[:, :, 0, 0] if node in self._flat else floats

    def views_to_leave(self, wanted: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the views among `wanted` that the program cannot return, and their maps.

        A map is returned once, in the shape in which it was written or as a view of it.
        """
        shown: dict[int, set[int]] = {}
        for node in wanted:
            index = self._maps[node].index
            shown.setdefault(self._roots.get(index, index), set()).add(index)
        left: dict[fx.Node, None] = {}
        own = {x.index for x in self.inputs.values()}
        for node in wanted:
            root = self._roots.get(self._maps[node].index)
            if root is None or (
                len(shown[root]) == 1 and root not in own and self._flat.get(node) is None
            ):
                continue
            while node in self._maps and self._maps[node].index in self._roots:
                left[node] = None
                node = node.all_input_nodes[0]
        return list(left)

    def finish(self, wanted: Sequence[fx.Node]) -> NativeRun:
        """Finish the program.

        Args:
            wanted: nodes of the run whose values are returned, in order, without views.
        """
        positions: dict[int, int] = {}
        leaving: list[fx.Node] = []
        for node in wanted:
            if self._maps[node].index not in positions:
                positions[self._maps[node].index] = len(leaving)
                leaving.append(node)
        self._program.finish(
            list(self.inputs.values()),
            [self._maps[node] for node in leaving],
            planar=[x for node, x in self.inputs.items() if self._takes_planar(node)],
            flat=[self._maps[node] for node in leaving if node in self._flat]
            + [x for node, x in self.inputs.items() if node in self._flat],
        )
        return NativeRun(
            self._program,
            tuple(self.steps),
            tuple(self.inputs),
            {node: positions[self._maps[node].index] for node in wanted},
        )

    def _takes_planar(self, node: fx.Node) -> bool:
        users = set(node.users).intersection(self.nodes)
        return all(is_call(user, torch.ops.aten.conv2d.default) for user in users)

    # -- values -----------------------------------------------------------------------------------

    def _map(self, value: Any, bit_channels: int | None = None) -> Map:
        """Return the map of a node's value; `bit_channels` is the channel count of a packed map."""
        if not isinstance(value, fx.Node) or value.op == "get_attr":
            raise Unsupported(f"takes {value}, which is no map")
        found = self._maps.get(value) or self.inputs.get(value)
        if found is None:
            found = self.inputs[value] = self._input(value, bit_channels)
        if not isinstance(found, Map) or found.packed != (bit_channels is not None):
            raise Unsupported(f"takes {value}, which is another kind of map")
        return found

    def _input(self, node: fx.Node, bit_channels: int | None) -> Map:
        value = self._value_of(node)
        if not isinstance(value, Tensor):
            raise Unsupported(f"takes {node}, whose shape is not known before it is computed")
        sizes = tuple(value.shape)
        if bit_channels is None and value.dtype != torch.float32:
            raise Unsupported(f"takes {node}, which is {value.dtype}")
        if len(sizes) not in (2, 4) or sizes[0] != BATCH or 0 in sizes:
            raise Unsupported(f"takes {node}, which is no batch of maps")
        if bit_channels is not None:
            _, height, width, _ = sizes
            return self._program.add_map(bit_channels, height, width, packed=True)
        if len(sizes) == 2:
            self._flat[node] = None
            return self._program.add_map(sizes[1], 1, 1)
        return self._program.add_map(*sizes[1:])

    def _image(self, value: Any) -> Map:
        """Return a float map [N, C, H, W]."""
        found = self._map(value)
        if value in self._flat:
            raise Unsupported(f"takes {value}, which is no map")
        return found

    def _constant(self, value: Any) -> Tensor | None:
        if value is None:
            return None
        tensor = constant(self._module, value)
        if tensor is None:
            raise Unsupported(f"has {value}, which is computed from the input")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise Unsupported(f"has {value.target} in {tensor.dtype}")
        return tensor

    def _step(self, *nodes: fx.Node, macs: int | None = None) -> None:
        self.steps.append(NativeStep(nodes, macs))
