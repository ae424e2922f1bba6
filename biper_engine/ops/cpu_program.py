"""Native programs: a run of a network's operators as one call into `csrc/cpu`.

A program is built step by step from maps, which stand for the values that flow: float32
[N, C, H, W] in channels_last memory, or packed [N, H, W, words]. The batch is free, H and W are
fixed. Steps that do not care about pixels take a map as so many numbers for each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from biper_engine.bits import words
from biper_engine.ops.cpu_module import native
from biper_engine.ops.cpu_threads import thread_count
from biper_engine.ops.native_arguments import dense, native_values
from biper_engine.ops.readable import readable

__all__ = ["CpuProgram", "Form", "Map"]


@dataclass(frozen=True)
class Map:
    """A value that flows: one image of it.

    Attributes:
        index: its number in the program.
        channels, height, width: of the float map, or of the unpacked one.
        packed: whether it holds bits.
    """

    index: int
    channels: int
    height: int
    width: int
    packed: bool = False

    @property
    def values(self) -> int:
        """Numbers or words of one image."""
        last = words(self.channels) if self.packed else self.channels
        return self.height * self.width * last


@dataclass(frozen=True)
class Form:
    """The tensor that comes in or leaves as a map.

    Attributes:
        map: the map.
        sizes: the tensor's sizes for one image; the first one is multiplied by the batch.
        channels_last: whether its memory is channels_last, not contiguous.
        integers: whether it holds integers: pixels of 32 or 64 bits of a packed map.
    """

    map: Map
    sizes: tuple[int, ...]
    channels_last: bool = False
    integers: bool = False

    @classmethod
    def of(cls, x: Map | Form) -> Form:
        """Return the form of a map as [N, C, H, W] or [N, H, W, words]."""
        if isinstance(x, Form):
            return x
        if x.packed:
            return cls(x, (1, x.height, x.width, words(x.channels)))
        return cls(x, (1, x.channels, x.height, x.width), channels_last=True)

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""
        if self.map.packed:
            return torch.int64 if self._wide else torch.int32
        return torch.float32

    @property
    def _wide(self) -> bool:
        return self.integers and self.map.channels == 64

    @property
    def layout(self) -> torch.memory_format:
        """The tensor's memory layout."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def takes(self, *, contiguous: bool) -> tuple[int, tuple[int, ...], bool, bool, bool, bool]:
        """Return the form as csrc/cpu has it; `contiguous` memory may do beside its own."""
        # The memory of 1x1 maps is the same in either layout.
        pixels = self.channels_last and self.sizes[2:] != (1, 1)
        kind = self.map.packed, self._wide
        return self.sizes[0], self.sizes[1:], *kind, contiguous or not pixels, pixels

    def empty(self, batch: int) -> Tensor:
        """Return a tensor of this form without values."""
        sizes = (batch * self.sizes[0], *self.sizes[1:])
        return torch.empty(sizes, dtype=self.dtype, memory_format=self.layout, device="cpu")

    def __str__(self) -> str:
        batch = "N" if self.sizes[0] == 1 else f"{self.sizes[0]} * N"
        return f"[{', '.join([batch, *map(str, self.sizes[1:])])}] {self.dtype}"


class CpuProgram:
    """A program for the instruction set that is in use when it is made."""

    def __init__(self) -> None:
        self._program = native().Program()

    # -- maps and steps ---------------------------------------------------------------------------

    def add_map(self, channels: int, height: int, width: int, *, packed: bool = False) -> Map:
        """Return a new map."""
        return self._map(self._program.add_map((height, width, channels, packed)))

    def view(self, x: Map, channels: int, height: int, width: int) -> Map:
        """Return the values of `x`, in the order of its memory, as another shape."""
        return self._map(self._program.add_view(x.index, (height, width, channels, x.packed)))

    def add(self, step: str, **arguments: Any) -> tuple[Map, ...]:
        """Add a step, and return the maps that it writes.

        Args:
            step: its kind, one of those of csrc/cpu/steps.cpp.
            arguments: as the file of the step describes them: maps, tensors, geometries, pools,
                numbers, names, lists of maps or integers; None stands for what is missing. The
                program copies what tensors hold.

        Raises:
            ValueError: an argument is missing, unknown, of another type or does not fit; nothing
                was added.
        """
        held = dense(arguments)
        values = {name: _numbered(value) for name, value in native_values(held).items()}
        written = self._program.add(step, values)
        return tuple(map(self._map, written))

    def _map(self, index: int) -> Map:
        height, width, channels, packed = self._program.shape(index)
        return Map(index, channels, height, width, packed)

    # -- calls ------------------------------------------------------------------------------------

    def finish(
        self,
        inputs: Sequence[Map | Form],
        outputs: Sequence[Map | Form],
        *,
        planar: Sequence[Map] = (),
    ) -> None:
        """End the program.

        Args:
            inputs: what calls pass; a map stands for [N, C, H, W], or for [N, H, W, words].
            outputs: what calls return.
            planar: inputs that also come in [N, C, H, W] memory, not only in channels_last.
        """
        forms, results = ([Form.of(x) for x in maps] for maps in (inputs, outputs))
        self._sources = [(form, form.map in planar) for form in forms]
        self._program.finish([x.map.index for x in forms], [x.map.index for x in results])
        self._caller = native().Caller(
            self._program,
            sources=[form.takes(contiguous=either) for form, either in self._sources],
            results=[(form.takes(contiguous=False), form.empty) for form in results],
        )
        self._call = self._caller.call

    def arena_bytes(self, batch: int) -> int:
        """Return the bytes of the maps that neither come in nor leave."""
        return int(self._program.arena_bytes(batch))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the program on tensors on the CPU, each of the form of its input.

        Raises:
            IndexError: an index into an embedding is none of its rows.
            ValueError: an input is no tensor of the map's shape and dtype on the CPU.
        """
        outputs = self.call_as_is(inputs)
        if outputs is None:
            outputs = self.call_as_is(self._laid_out(inputs))
        if outputs is None:
            self._refuse(inputs)
        return outputs

    def call_as_is(
        self, inputs: tuple[Tensor, ...], watch: Any = None
    ) -> tuple[Tensor, ...] | None:
        """Run the program, unless a tensor would have to be checked, copied or detached first.

        Args:
            inputs: as for a call.
            watch: of the compiled module, or None: the program runs only where that holds.

        Returns:
            None, with nothing done, where an input is a subclass of Tensor or requires grad, has
            another shape, dtype, device or memory layout than its map, the negative bit or memory
            that is not aligned, where their number or batches do not fit, and where `watch` does
            not hold.

        Raises:
            ValueError: `BIPER_NUM_THREADS` is no integer from 1 to 1024.
        """
        outputs: tuple[Tensor, ...] | None = self._call(inputs, thread_count(), watch)
        return outputs

    def timed(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[float]]:
        """Run the program; also return how many seconds each step took, in order.

        Raises:
            ValueError: as for a call.
        """
        outputs, ends = self._caller.timed(self._laid_out(inputs), thread_count())
        if outputs is None:
            self._refuse(inputs)
        seconds = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
        return outputs, seconds

    def _laid_out(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if len(inputs) != len(self._sources):
            self._refuse(inputs)
        return tuple(
            _lay_out(readable(f"inputs[{i}]", x), form, planar)
            for i, (x, (form, planar)) in enumerate(zip(inputs, self._sources, strict=True))
        )

    def _refuse(self, inputs: tuple[Tensor, ...]) -> NoReturn:
        came = [f"{list(x.shape)} {x.dtype} on {x.device}" for x in inputs]
        raise ValueError(
            f"This program takes {', '.join(str(form) for form, _ in self._sources)}, one N for "
            f"all, in memory of the CPU; got {', '.join(came)}."
        )


def _numbered(value: Any) -> Any:
    """Return maps, also those in a list, by their numbers."""
    if isinstance(value, Map):
        return value.index
    return [_numbered(item) for item in value] if isinstance(value, list) else value


def _lay_out(x: Tensor, form: Form, planar: bool) -> Tensor:
    """Return `x` in a memory layout that a program reads, unless its rank is wrong."""
    if (planar and x.is_contiguous()) or (form.channels_last and x.dim() != 4):
        return x
    return x.contiguous(memory_format=form.layout)
