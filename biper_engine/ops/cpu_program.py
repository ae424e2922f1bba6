"""Native programs: a run of a network's operators as one call into `csrc/cpu`.

A program is built step by step from maps, which stand for the values that flow: float32
[N, C, H, W] in channels_last memory, or packed [N, H, W, words]. The batch is free, H and W are
fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from biper_engine.bits import words
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops.cpu import native, native_conv, thread_count
from biper_engine.ops.epilogue import Epilogue
from biper_engine.ops.native_arguments import geometry_values, native_memory
from biper_engine.ops.readable import readable

__all__ = ["Clamp", "CpuProgram", "Map"]

_NONE = -1
_NO_POOL = Pool2dGeometry()


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


@dataclass(frozen=True)
class Clamp:
    """Limits of values; infinite where there is none."""

    low: float = -math.inf
    high: float = math.inf


class CpuProgram:
    """A program for the instruction set that is in use when it is made.

    Methods that add a step return its maps. The program copies what they are given, but for
    prepacked weights, which live as long as it does: nobody else may write to those.

    Raises:
        TypeError: a tensor has another dtype; nothing was added.
        ValueError: shapes do not fit; nothing was added.
    """

    def __init__(self) -> None:
        self._program = native().Program()
        self._kept: list[Tensor] = []

    # -- maps -------------------------------------------------------------------------------------

    def add_map(self, channels: int, height: int, width: int, *, packed: bool = False) -> Map:
        """Return a new map."""
        index = self._program.add_map((height, width, channels, packed))
        return Map(index, channels, height, width, packed)

    def view(self, x: Map, channels: int, height: int, width: int) -> Map:
        """Return the values of `x`, in the order of its memory, as another shape."""
        index = self._program.add_view(x.index, (height, width, channels, x.packed))
        return Map(index, channels, height, width, x.packed)

    # -- steps ------------------------------------------------------------------------------------

    def conv(
        self,
        bits: Map,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        prepacked: Tensor,
        residual: Map | None,
        *,
        want_float: bool,
        want_bits: bool,
    ) -> tuple[Map | None, Map | None]:
        """Add a binary convolution with its epilogue."""
        prepacked = prepacked.contiguous()
        self._kept.append(prepacked)
        conv = native_conv(geometry, epilogue, prepacked)
        rows, columns = epilogue.pool.output_size(*geometry.output_size(bits.height, bits.width))
        outs = self._outs(geometry.out_channels, rows, columns, want_float, want_bits)
        self._program.add_conv(
            conv,
            bits.index,
            _NONE if residual is None else residual.index,
            *map(_index, outs),
        )
        return outs

    def float_conv(
        self,
        x: Map,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Conv2dGeometry,
        *,
        pool: Pool2dGeometry = _NO_POOL,
        clamp: Clamp = Clamp(),
        want_float: bool = True,
        want_bits: bool = False,
        threshold: Tensor | None = None,
        sense: Tensor | None = None,
    ) -> tuple[Map | None, Map | None]:
        """Add a float convolution without groups, then max pool, clamp, its map and its bits.

        Args:
            x: its input.
            weight: [O, C, KH, KW].
            bias: [O], or None.
            geometry: the convolution.
            pool: after the convolution.
            clamp: after the pool.
            want_float: whether the float map leaves.
            want_bits: whether its bits leave.
            threshold: of the bits, as in `biper::binarize`.
            sense: of the bits, as in `biper::binarize`.
        """
        _require_dtypes(weight=weight, bias=bias, threshold=threshold, sense=sense)
        ordered = weight.permute(0, 2, 3, 1).contiguous()
        bias, threshold, sense = (
            None if value is None else value.contiguous() for value in (bias, threshold, sense)
        )
        conv = native().FloatConv(
            geometry_values(geometry),
            native_memory(ordered),
            native_memory(bias),
            pool=_window(pool.kernel_size, pool.stride, pool.padding),
            clamp_min=clamp.low,
            clamp_max=clamp.high,
            threshold=native_memory(threshold),
            sense=native_memory(sense),
        )
        rows, columns = pool.output_size(*geometry.output_size(x.height, x.width))
        outs = self._outs(geometry.out_channels, rows, columns, want_float, want_bits)
        self._program.add_float_conv(conv, x.index, *map(_index, outs))
        return outs

    def binarize(self, x: Map, threshold: Tensor | None, sense: Tensor | None) -> Map:
        """Add `biper::binarize`."""
        _require_dtypes(threshold=threshold, sense=sense)
        out = self.add_map(x.channels, x.height, x.width, packed=True)
        threshold, sense = (
            None if value is None else value.contiguous() for value in (threshold, sense)
        )
        limits = native_memory(threshold), native_memory(sense)
        self._program.add_binarize(x.index, *limits, out.index)
        return out

    def bit_pool(self, bits: Map, pool: Pool2dGeometry, take_and: Tensor | None) -> Map:
        """Add `biper::bmaxpool2d`."""
        _require_dtypes(take_and=take_and)
        out = self.add_map(bits.channels, *pool.output_size(bits.height, bits.width), packed=True)
        take_and = None if take_and is None else take_and.contiguous()
        window = _window(pool.kernel_size, pool.stride, pool.padding)
        self._program.add_bit_pool(bits.index, window, native_memory(take_and), out.index)
        return out

    def average(
        self,
        x: Map,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        size: tuple[int, int],
        *,
        count_padding: bool = True,
        divisor: int = 0,
        channels_before: int = 0,
        channels_after: int = 0,
    ) -> Map:
        """Add an average pool, then zero channels on both sides.

        Args:
            x: its input.
            kernel: (KH, KW).
            stride: of the pool.
            padding: of the pool, at most half the kernel.
            size: (OH, OW), which `ceil_mode` decides.
            count_padding: divide by the window with its padding, else by the values in the map.
            divisor: divide by this instead, unless 0.
            channels_before: zero channels to add in front.
            channels_after: zero channels to add behind.
        """
        out = self.add_map(channels_before + x.channels + channels_after, *size)
        self._program.add_average(
            x.index,
            _window(kernel, stride, padding),
            count_padding,
            divisor,
            channels_before,
            out.index,
        )
        return out

    def maximum(
        self,
        x: Map,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        size: tuple[int, int],
    ) -> Map:
        """Add a max pool of a float map; padding never wins."""
        out = self.add_map(x.channels, *size)
        self._program.add_maximum(x.index, _window(kernel, stride, padding), out.index)
        return out

    def sum(self, a: Map, b: Map | None, clamp: Clamp) -> Map:
        """Add `clamp(a + b)`, or `clamp(a)`."""
        out = self.add_map(a.channels, a.height, a.width)
        other = _NONE if b is None else b.index
        self._program.add_sum(a.index, other, clamp.low, clamp.high, out.index)
        return out

    def _outs(
        self, channels: int, height: int, width: int, want_float: bool, want_bits: bool
    ) -> tuple[Map | None, Map | None]:
        floats = self.add_map(channels, height, width) if want_float else None
        bits = self.add_map(channels, height, width, packed=True) if want_bits else None
        return floats, bits

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


def _require_dtypes(**tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        wanted = torch.bool if name in ("sense", "take_and") else torch.float32
        if value is not None and value.dtype != wanted:
            raise TypeError(f"`{name}` must be {wanted}, but its dtype is {value.dtype}.")


def _index(x: Map | None) -> int:
    return _NONE if x is None else x.index


def _window(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[int, ...]:
    return (*kernel, *stride, *padding)
