"""A run of operators as one native program, with its inputs, values and outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.graph.reading import constant
from biper_engine.graph.shapes import BATCH
from biper_engine.ops.cpu_program import CpuProgram, Form, Map
from biper_engine.runtime.placement import (
    CHANNELS_LAST,
    INTEGERS,
    Placed,
    constant_of,
    dense_image,
    fills,
    is_dense,
    memory_order,
    place_map,
    place_packed,
)

__all__ = ["NativeRun", "NativeStep", "RunMaps", "Unsupported"]


class Unsupported(Exception):
    """A node without a step; the message says why, with the node as its subject."""


@dataclass(frozen=True)
class NativeStep:
    """One step of a program.

    Attributes:
        nodes: nodes of the graph that the step computes, or one that needs a copy which it makes.
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
    """A program under construction, and the values of its nodes.

    Args:
        module: a converted network.
        value_of: returns the value of a node outside the run as a tensor without data, for BATCH
            images; None if it is not known.
        program: an empty program.

    Attributes:
        nodes: nodes that the run computes, with views of its values, in order.
        steps: steps of the program.
        inputs: nodes outside the run, and their values in the run.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        value_of: Callable[[fx.Node], Any],
        program: CpuProgram,
    ) -> None:
        self.nodes: list[fx.Node] = []
        self.steps: list[NativeStep] = []
        self.inputs: dict[fx.Node, Placed] = {}
        self._module = module
        self._value_of = value_of
        self._program = program
        self._values: dict[fx.Node, Any] = {}  # Placed, or a tuple of Placed and None
        self._computed: dict[fx.Node, Tensor] = {}  # values that come from constants alone
        self._expected: Any = None  # what the node at work returns for BATCH images, without data
        self._copies: dict[Any, Map] = {}  # maps that hold values in another order
        self._floats: dict[int, Map] = {}  # integers of inputs, as floats
        self._kept: list[Tensor] = []  # constants whose copies are known by their identity
        self._roots: dict[int, int] = {}  # views, and the maps whose memory they share
        self._read: dict[int, set[str]] = {}  # maps, and the steps that read them
        self._node: fx.Node | None = None  # for which steps are added now

    def value(self, node: fx.Node) -> Any:
        """Return the value of a node of the run without data, for BATCH images."""
        computed = self._computed.get(node)
        return _without_data(self._values[node]) if computed is None else computed.to("meta")

    def expected(self, node: fx.Node) -> Tensor:
        """Return what the node at work returns for BATCH images, without data.

        Raises:
            Unsupported: it is no tensor of a known shape.
        """
        assert node is self._node
        if not isinstance(self._expected, Tensor):
            raise Unsupported("has a result whose shape is not known before it is computed")
        return self._expected

    def left_out(self, wanted: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the nodes whose values are `wanted` that no program can return.

        These are constants, bools, integers, empty values, and views whose batch is not the first
        dimension.
        """
        left: dict[fx.Node, None] = {}
        remaining = list(wanted)
        while remaining:
            node = remaining.pop()
            value = self._values.get(node)
            if node in self._computed and node not in left:
                left[node] = None
                remaining.extend(node.all_input_nodes)
            if node in left or value is None or node in self.inputs:
                continue
            inside = not isinstance(value, Placed) or value.truth or value.integers
            if inside or value.batch != 0 or 0 in value.sizes:
                left[node] = None
                remaining.extend(node.all_input_nodes)
        return list(left)

    def finish(self, wanted: Sequence[fx.Node]) -> NativeRun:
        """Finish the program.

        Args:
            wanted: nodes of the run whose values are returned, in order.
        """
        positions: dict[fx.Node, int] = {}
        forms: list[Form] = []
        for node in wanted:
            self._node = node
            form = self._leaving(self._values[node], forms)
            if form not in forms:
                forms.append(form)
            positions[node] = forms.index(form)
        self._program.finish(
            [self._coming(x) for x in self.inputs.values()],
            forms,
            planar=[_map_of(x) for x in self.inputs.values() if self._takes_planar(x)],
        )
        return NativeRun(self._program, tuple(self.steps), tuple(self.inputs), positions)

    def _coming(self, x: Placed) -> Form:
        channels_last = not x.packed and len(x.sizes) == 4
        return Form(_map_of(x), x.sizes, channels_last, integers=x.integers is not None)

    def _takes_planar(self, x: Placed) -> bool:
        """Whether every step that reads an input can also read it as [N, C, H, W]."""
        return x.sizes[0] == 1 and self._read.get(_map_of(x).index) == {"float_conv"}

    def _leaving(self, x: Placed, taken: Sequence[Form]) -> Form:
        """Return the form in which a value leaves: its own memory, or a copy of it."""
        form = self._form_of(x)
        own = {_map_of(value).index for value in self.inputs.values()}
        if (
            form is not None
            and form.map.index not in own
            and (form in taken or form.map not in [other.map for other in taken])
        ):
            return form
        copy = self._copied(x, tuple(range(len(x.sizes))), again=True)
        return Form(copy, x.sizes)

    def _form_of(self, x: Placed) -> Form | None:
        """Return the form of a value that fills its memory in an order that tensors have."""
        if x.shape is not None or isinstance(x.source, Tensor) or not fills(x):
            return None
        if x.image.dim() == 4 and not x.packed and is_dense(x.image, CHANNELS_LAST):
            return Form(x.source, x.sizes, channels_last=True)
        if is_dense(x.image, range(x.image.dim())):
            return Form(x.source, x.sizes)
        return None

    # -- values -----------------------------------------------------------------------------------

    def placed(self, value: Any) -> Placed:
        """Return where the numbers of a node's value are; a packed map has words.

        Raises:
            Unsupported: the value is no tensor that a program takes.
        """
        if not isinstance(value, fx.Node):
            raise Unsupported(f"takes {value}, which is no map")
        found = self._values.get(value) or self.inputs.get(value)
        if found is None and (value.op == "get_attr" or value in self._computed):
            return self.of_constant(self.tensor(value))
        integers = None if value in self._values else self.integers(value)
        if integers is not None:
            return self._as_floats(integers)
        if found is None:
            found = self.inputs[value] = self._input(value, None)
        if not isinstance(found, Placed):
            raise Unsupported(f"takes {value}, which is several values")
        if 0 in found.sizes:
            raise Unsupported(f"takes {value}, which is empty")
        return found

    def numbers(self, value: Any) -> Placed:
        """Return a float value whose first dimension is the batch, or a constant.

        Raises:
            Unsupported: the value is another one.
        """
        found = self.placed(value)
        if found.packed:
            raise Unsupported(f"takes {value}, which is another kind of map")
        if found.batch not in (0, None):
            raise Unsupported(f"takes {value}, whose first dimension is not the batch")
        return found

    def flowing(self, value: Any) -> Placed:
        """Return a float value whose first dimension is the batch.

        Raises:
            Unsupported: the value is another one.
        """
        found = self.numbers(value)
        if found.batch is None:
            raise Unsupported(f"takes {value}, which is constant")
        return found

    def bits(self, value: Any, channels: int) -> Map:
        """Return a packed map with so many channels.

        Raises:
            Unsupported: the value is another one.
        """
        if not isinstance(value, fx.Node) or value.op == "get_attr":
            raise Unsupported(f"takes {value}, which is no map")
        found = self._values.get(value) or self.inputs.get(value)
        if found is None:
            found = self.inputs[value] = self._input(value, channels)
        if not isinstance(found, Placed) or not found.packed or found.integers:
            raise Unsupported(f"takes {value}, which is another kind of map")
        return _map_of(found)

    def integers(self, value: Any) -> Placed | None:
        """Return an input of integers, int32 or int64, or None if the value is something else."""
        if not isinstance(value, fx.Node) or value.op == "get_attr":
            return None
        found = self.inputs.get(value)
        if found is None and value not in self._values and value not in self._computed:
            known = self._value_of(value)
            if isinstance(known, Tensor) and known.dtype in INTEGERS:
                found = self.inputs[value] = self._integer_input(value, known)
        return found if found is not None and found.integers else None

    def _as_floats(self, x: Placed) -> Placed:
        """Return the integers of an input as floats, rounded as PyTorch rounds them."""
        source = _map_of(x)
        if source.index not in self._floats:
            (self._floats[source.index],) = self.emit("integers", x=source)
        return replace(x, source=self._floats[source.index])

    def _integer_input(self, node: fx.Node, value: Tensor) -> Placed:
        sizes = tuple(value.shape)
        if not sizes or sizes[0] % BATCH != 0 or 0 in sizes:
            raise Unsupported(f"takes {node}, which is no batch")
        image = dense_image((sizes[0] // BATCH, *sizes[1:]))
        made = self._program.add_map(8 * value.dtype.itemsize, image.numel(), 1, packed=True)
        return Placed(made, image, integers=value.dtype)

    def tensor(self, value: Any, *, any_dtype: bool = False) -> Tensor:
        """Return a constant.

        Raises:
            Unsupported: the value is computed, or, unless `any_dtype`, of half or double precision.
        """
        tensor = self._computed.get(value)
        if tensor is None:
            tensor = constant(self._module, value)
        if tensor is None:
            raise Unsupported(f"has {value}, which is computed from the input")
        exact = not tensor.is_floating_point() or tensor.dtype == torch.float32
        if not exact and tensor.dim() > 0 and not any_dtype:
            raise Unsupported(f"has {value} in {tensor.dtype}")
        return tensor

    def of_constant(self, tensor: Tensor) -> Placed:
        """Return a constant as a value."""
        return constant_of(tensor)

    def optional_tensor(self, value: Any) -> Tensor | None:
        """Return a constant, or None.

        Raises:
            Unsupported: as `tensor` does.
        """
        return None if value is None else self.tensor(value)

    def _input(self, node: fx.Node, bit_channels: int | None) -> Placed:
        value = self._value_of(node)
        if not isinstance(value, Tensor):
            raise Unsupported(f"takes {node}, whose shape is not known before it is computed")
        sizes = tuple(value.shape)
        packed = bit_channels is not None
        if not packed and value.dtype != torch.float32:
            raise Unsupported(f"takes {node}, which is {value.dtype}")
        if not sizes or sizes[0] % BATCH != 0 or 0 in sizes or (packed and len(sizes) != 4):
            raise Unsupported(f"takes {node}, which is no batch of maps")
        images = sizes[0] // BATCH
        if bit_channels is not None:
            height, width = images * sizes[1], sizes[2]
            return place_packed(
                self._program.add_map(bit_channels, height, width, packed=True), images
            )
        if len(sizes) == 4:
            _, channels, height, width = sizes
            return place_map(self._program.add_map(channels, images * height, width), images)
        image = dense_image((images, *sizes[1:]))
        return Placed(self._program.add_map(image.numel(), 1, 1), image)

    # -- memory -----------------------------------------------------------------------------------

    def in_order(self, x: Placed, order: Sequence[int]) -> Map:
        """Return a map that a value fills, its dimensions in `order` from the outermost one."""
        if x.shape is None and isinstance(x.source, Map) and fills(x) and is_dense(x.image, order):
            return x.source
        return self._copied(x, order)

    def natural(self, x: Placed) -> Map:
        """Return a map that a value fills in the order of its dimensions."""
        return self.in_order(x, range(len(x.sizes)))

    def settled(self, x: Placed) -> Placed:
        """Return a value whose dimensions lie in memory with strides, copied if need be."""
        if x.shape is None:
            return x
        copy = self._copied(x, range(len(x.shape)))
        return replace(x, source=copy, image=dense_image(x.shape), shape=None)

    def pixels(self, x: Placed) -> Map:
        """Return a map whose pixels are those of all images of a value [images, C, H, W]."""
        images, channels, height, width = x.sizes
        return self.seen(self.in_order(x, CHANNELS_LAST), channels, images * height, width)

    def seen(self, x: Map, channels: int, height: int, width: int) -> Map:
        """Return the numbers of a map, in the order of its memory, as another map."""
        if (x.channels, x.height, x.width) == (channels, height, width):
            return x
        view = self._program.view(x, channels, height, width)
        self._roots[view.index] = self._roots.get(x.index, x.index)
        return view

    def _copied(self, x: Placed, order: Sequence[int], *, again: bool = False) -> Map:
        """Return a map with the numbers of `x` in an order; `again`: one of its own."""
        sizes = x.sizes
        source = x.source.index if isinstance(x.source, Map) else id(x.source)
        image = x.image
        form = (tuple(image.shape), image.stride(), image.storage_offset())
        key = (source, form, sizes, tuple(order))
        if key in self._copies and not again:
            return self._copies[key]
        if x.shape is not None and tuple(order) != tuple(range(len(sizes))):
            made = self._copied(self.settled(x), order, again=again)
        elif isinstance(x.source, Tensor):
            self._kept.append(x.source)
            flat = x.source.as_strided(image.shape, image.stride(), image.storage_offset())
            values = flat.reshape(sizes).permute(tuple(order)).contiguous().flatten()
            (made,) = self.emit("constant", values=values)
        else:
            dims = order if x.shape is None else range(image.dim())
            made = self._rearranged(x.source, image, dims)
        self._copies.setdefault(key, made)
        return made

    def _rearranged(self, source: Map, image: Tensor, order: Sequence[int]) -> Map:
        tables = [[i * image.stride(dim) for i in range(image.shape[dim])] for dim in order]
        return self.rearrange(source, tables, int(image.storage_offset()))

    def rearrange(
        self, source: Map, tables: Sequence[Sequence[int]], offset: int = 0, fill: float = 0.0
    ) -> Map:
        """Add a step that moves numbers: `places` of csrc/cpu/step_moves.cpp, a list for each size.

        Args:
            source: map to read.
            tables: places for each dimension of the result, outermost first; -1 for `fill`.
            offset: place of the first number.
            fill: number where there is none.
        """
        tables = [list(table) for table in tables] or [[0]]
        if offset and min(tables[0]) < 0:
            tables.insert(0, [offset])
        else:
            tables[0] = [place + offset for place in tables[0]]
        (made,) = self.emit(
            "rearrange",
            x=source,
            sizes=list(map(len, tables)),
            places=[place for table in tables for place in table],
            fill=fill,
        )
        return made

    # -- steps ------------------------------------------------------------------------------------

    def emit(
        self, step: str, *behind: fx.Node, macs: int | None = None, **arguments: Any
    ) -> tuple[Map, ...]:
        """Add a step for the node at work, and for those `behind` it; return what it writes."""
        assert self._node is not None
        written = self._program.add(step, **arguments)
        for value in arguments.values():
            for read in value if isinstance(value, list) else [value]:
                if isinstance(read, Map):
                    root = self._roots.get(read.index, read.index)
                    kind = step if root == read.index else f"{step} of a view"
                    self._read.setdefault(root, set()).add(kind)
        self.steps.append(NativeStep((self._node, *behind), macs))
        return written

    def set(self, node: fx.Node, value: Placed | tuple[Placed | None, ...] | None) -> None:
        """Say what the value of a node is; None if nothing needs it."""
        self._values[node] = value


def _map_of(x: Placed) -> Map:
    assert isinstance(x.source, Map)
    return x.source


def _without_data(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_without_data, value))
    if value is None:
        return None
    dtype = torch.bool if value.truth else torch.int32 if value.packed else torch.float32
    dtype = value.integers or dtype
    return torch.empty(value.sizes_for(BATCH), dtype=dtype, device="meta")


def leading(operands: Sequence[Placed], sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the order in memory of a result, that of the first operand with all of its places."""
    for x in operands:
        strides = [x.image.stride(d) for d in range(x.image.dim()) if x.image.shape[d] > 1]
        if tuple(x.image.shape) == tuple(sizes) and x.batch is not None and 0 not in strides:
            return memory_order(x.image)
    return tuple(range(len(sizes)))


def count_of(sizes: Sequence[int]) -> int:
    """Return the number of places of a tensor with these sizes."""
    return math.prod(sizes)
