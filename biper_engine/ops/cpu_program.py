"""Native programs: a run of a network's operators as one call into `csrc/cpu`.

A program is built step by step from maps, which stand for the values that flow: float32
[N, C, H, W] in channels_last memory, or packed [N, H, W, words]. The batch is free, H and W are
fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from biper_engine.bits import words
from biper_engine.ops.cpu_module import native
from biper_engine.ops.cpu_threads import thread_count
from biper_engine.ops.native_arguments import dense, native_values
from biper_engine.ops.readable import readable

__all__ = ["CpuProgram", "Map"]


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


class CpuProgram:
    """A program for the instruction set that is in use when it is made."""

    def __init__(self) -> None:
        self._program = native().Program()
        self._kept: list[Tensor] = []

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
                numbers; None stands for what is missing. The program copies what tensors hold, but
                for `prepacked`, which it keeps: nobody else may write to that.

        Raises:
            ValueError: an argument is missing, unknown, of another type or does not fit; nothing
                was added.
        """
        held = dense(arguments)
        values = {
            name: value.index if isinstance(value, Map) else value
            for name, value in native_values(held).items()
        }
        written = self._program.add(step, values)
        if "prepacked" in held:
            self._kept.append(held["prepacked"])
        return tuple(map(self._map, written))

    def _map(self, index: int) -> Map:
        height, width, channels, packed = self._program.shape(index)
        return Map(index, channels, height, width, packed)

    # -- calls ------------------------------------------------------------------------------------

    def finish(
        self,
        inputs: Sequence[Map],
        outputs: Sequence[Map],
        *,
        planar: Sequence[Map] = (),
        flat: Sequence[Map] = (),
    ) -> None:
        """End the program.

        Args:
            inputs: maps that calls pass.
            outputs: maps that calls return.
            planar: inputs that also come in [N, C, H, W] memory, not only in channels_last.
            flat: inputs and outputs that are [N, C], where the map is 1x1.
        """
        # The memory of a 1x1 map is the same in either layout; only this one suits [N, C], too.
        self._sources = [
            (x in planar, _layout(x.packed or x.height == x.width == 1)) for x in inputs
        ]
        self._takes = [
            f"[N, {', '.join(map(str, _image(x, x in flat)))}] {_dtype(x)}" for x in inputs
        ]
        self._program.finish([x.index for x in inputs], [x.index for x in outputs])
        self._caller = native().Caller(
            self._program,
            sources=[
                _form(x, x in flat, either or layout == torch.contiguous_format, layout)
                for x, (either, layout) in zip(inputs, self._sources, strict=True)
            ],
            results=[_result(x, x in flat) for x in outputs],
        )
        self._call = self._caller.call

    def arena_bytes(self, batch: int) -> int:
        """Return the bytes of the maps that neither come in nor leave."""
        return int(self._program.arena_bytes(batch))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the program on tensors on the CPU, each [N, C, H, W], [N, C] or packed.

        Raises:
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
            _lay_out(readable(f"inputs[{i}]", x), planar, layout)
            for i, (x, (planar, layout)) in enumerate(zip(inputs, self._sources, strict=True))
        )

    def _refuse(self, inputs: tuple[Tensor, ...]) -> NoReturn:
        came = [f"{list(x.shape)} {x.dtype} on {x.device}" for x in inputs]
        raise ValueError(
            f"This program takes {', '.join(self._takes)}, one N for all, in memory of the CPU; "
            f"got {', '.join(came)}."
        )


def _layout(plain: bool) -> torch.memory_format:
    return torch.contiguous_format if plain else torch.channels_last


def _lay_out(x: Tensor, planar: bool, layout: torch.memory_format) -> Tensor:
    """Return `x` in a memory layout that a program reads, unless its rank is wrong."""
    if (planar and x.is_contiguous()) or (layout == torch.channels_last and x.dim() != 4):
        return x
    return x.contiguous(memory_format=layout)


def _dtype(x: Map) -> torch.dtype:
    return torch.int32 if x.packed else torch.float32


def _image(x: Map, flat: bool) -> tuple[int, ...]:
    """Return the shape of one image of a map."""
    if x.packed:
        return (x.height, x.width, words(x.channels))
    return (x.channels,) if flat else (x.channels, x.height, x.width)


def _form(
    x: Map, flat: bool, contiguous: bool, layout: torch.memory_format
) -> tuple[tuple[int, ...], bool, bool, bool]:
    """Return what a tensor of a map is: an image, whether it is packed, and which layouts do."""
    return _image(x, flat), x.packed, contiguous, layout == torch.channels_last


def _result(x: Map, flat: bool) -> tuple[tuple[Any, ...], Callable[[int], Tensor]]:
    """Return what a tensor of an output is, and what makes it for so many images."""
    shape, layout = _image(x, flat), _layout(x.packed or flat)

    def empty(batch: int) -> Tensor:
        return torch.empty((batch, *shape), dtype=_dtype(x), memory_format=layout, device="cpu")

    return _form(x, flat, layout == torch.contiguous_format, layout), empty
