"""Native programs that remember how they were made, so that they can be made again elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from biper_engine.ops.cpu_program import CpuProgram, Form, Map
from biper_engine.ops.native_arguments import native_values

__all__ = ["AddedMap", "AddedStep", "AddedView", "RecordedProgram"]


@dataclass(frozen=True)
class AddedMap:
    """A call of `add_map`; `shape` is (height, width, channels, packed)."""

    shape: tuple[int, int, int, bool]


@dataclass(frozen=True)
class AddedView:
    """A call of `view`: the map that it shows, and the shape that it gives it."""

    map: int
    shape: tuple[int, int, int, bool]


@dataclass(frozen=True)
class AddedStep:
    """A call of `add`.

    Attributes:
        step: its kind.
        arguments: without those that are missing. Maps are numbers, geometries and pools integers;
            tensors are as they were given, perhaps views of a constant of the graph.
    """

    step: str
    arguments: dict[str, Any]


class RecordedProgram(CpuProgram):
    """A program that keeps what was added to it, and the tensors of that.

    Attributes:
        added: maps, views and steps, in order.
        sources: forms of what calls pass, and whether each may be planar.
        results: forms of what calls return.
    """

    def __init__(self) -> None:
        super().__init__()
        self.added: list[AddedMap | AddedView | AddedStep] = []
        self.sources: list[tuple[Form, bool]] = []
        self.results: list[Form] = []

    def add_map(self, channels: int, height: int, width: int, *, packed: bool = False) -> Map:
        """Return a new map."""
        made = super().add_map(channels, height, width, packed=packed)
        self.added.append(AddedMap(_shape(made)))
        return made

    def view(self, x: Map, channels: int, height: int, width: int) -> Map:
        """Return the values of `x`, in the order of its memory, as another shape."""
        made = super().view(x, channels, height, width)
        self.added.append(AddedView(x.index, _shape(made)))
        return made

    def add(self, step: str, **arguments: Any) -> tuple[Map, ...]:
        """Add a step, and return the maps that it writes; see `CpuProgram.add`."""
        written = super().add(step, **arguments)
        held = {name: _recorded(value) for name, value in arguments.items() if value is not None}
        self.added.append(AddedStep(step, held))
        return written

    def finish(
        self,
        inputs: Sequence[Map | Form],
        outputs: Sequence[Map | Form],
        *,
        planar: Sequence[Map] = (),
    ) -> None:
        """End the program; see `CpuProgram.finish`."""
        super().finish(inputs, outputs, planar=planar)
        self.sources, self.results = self._sources, list(map(Form.of, outputs))


def _shape(x: Map) -> tuple[int, int, int, bool]:
    return x.height, x.width, x.channels, x.packed


def _recorded(value: Any) -> Any:
    if isinstance(value, Map):
        return value.index
    if isinstance(value, list | tuple):
        return [_recorded(item) for item in value]
    if isinstance(value, Tensor):
        return value
    plain = native_values({"value": value})["value"]
    return list(plain) if isinstance(plain, tuple) else plain
