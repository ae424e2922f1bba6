"""The native CPU backend: the vocabulary, operator by operator, on the kernels of `csrc/cpu`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from biper_engine.bits import words
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops.backends import Backend
from biper_engine.ops.cpu_module import missing_reason, native
from biper_engine.ops.cpu_threads import thread_count
from biper_engine.ops.epilogue import STEPS, Epilogue
from biper_engine.ops.matrix import MatrixScale, MatrixShape
from biper_engine.ops.native_arguments import (
    channels_last,
    contiguous,
    dense,
    geometry_values,
    native_memory,
    native_values,
    pool_values,
    typed_memory,
)
from biper_engine.ops.stem import PLAN_OPERATORS

__all__ = ["CpuBackend"]


def _empty_map(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last
    return torch.empty((n, c, h, w), dtype=dtype, memory_format=layout, device="cpu")


def _empty_words(n: int, h: int, w: int, count: int) -> Tensor:
    return torch.empty((n, h, w, count), dtype=torch.int32, device="cpu")


class _Fused:
    """A convolution with fixed weights and epilogue, ready to run on images of any size."""

    def __init__(
        self,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        prepacked: Tensor,
        float_dtype: torch.dtype | None,
        want_bits: bool,
    ) -> None:
        made_from = dense({"geometry": geometry, "prepacked": prepacked, **epilogue.values()})
        self._conv: Any = native().Conv(native_values(made_from))
        self._kept = prepacked  # the convolution has its address
        self._geometry = geometry
        self._pool = None if epilogue.pool.is_identity else epilogue.pool
        self._float_dtype = float_dtype
        self._want_bits = want_bits
        self._out_words = words(geometry.out_channels)
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}

    def _output_size(self, height: int, width: int) -> tuple[int, int]:
        size = self._sizes.get((height, width))
        if size is None:
            size = self._geometry.output_size(height, width)
            if self._pool is not None:
                size = self._pool.output_size(*size)
            self._sizes[height, width] = size
        return size

    def __call__(
        self, bits: Tensor, residual: Tensor | None, gate: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        bits = bits.contiguous()
        batch, height, width, _ = bits.shape
        rows, columns = self._output_size(height, width)
        if residual is not None:
            residual = channels_last(residual)
        if gate is not None:
            gate = gate.float().contiguous()
        floats = packed = None
        if self._float_dtype is not None:
            channels = self._geometry.out_channels
            floats = _empty_map(batch, channels, rows, columns, self._float_dtype)
        if self._want_bits:
            packed = _empty_words(batch, rows, columns, self._out_words)
        self._conv.run(
            batch,
            height,
            width,
            native_memory(bits),
            typed_memory(residual),
            typed_memory(floats),
            native_memory(packed),
            native_memory(gate),
            (0, 0) if gate is None else tuple(gate.shape[:2]),
            thread_count(),
        )
        return floats, packed


class CpuBackend(Backend):
    """Kernels of csrc/cpu, for the best instruction set that the processor has."""

    name = "cpu"
    steps = frozenset(STEPS)

    def unavailable_reason(self) -> str | None:
        return missing_reason()

    def unsupported_reason(
        self, op: str, geometry: Conv2dGeometry | None, device: torch.device
    ) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, the tensors are on {device}"
        if op in PLAN_OPERATORS:
            return "this backend's programs fuse the float ends of a network by themselves"
        return None

    def prepack_layout(self, geometry: Conv2dGeometry) -> tuple[tuple[int, ...], torch.dtype]:
        return (native().prepacked_words(geometry_values(geometry)),), torch.int32

    def prepack(self, weight: Tensor, geometry: Conv2dGeometry) -> Tensor:
        shape, dtype = self.prepack_layout(geometry)
        weight = weight.contiguous()
        prepacked = weight.new_empty(shape, dtype=dtype)
        native().prepack(geometry_values(geometry), native_memory(weight), native_memory(prepacked))
        return prepacked

    def binarize(self, x: Tensor, threshold: Tensor | None, sense: Tensor | None) -> Tensor:
        x, threshold, sense = channels_last(x), contiguous(threshold), contiguous(sense)
        n, c, h, w = x.shape
        packed = _empty_words(n, h, w, words(c))
        native().binarize(
            n * h * w,
            c,
            typed_memory(x),
            native_memory(threshold),
            native_memory(sense),
            native_memory(packed),
            thread_count(),
        )
        return packed

    def unbinarize(self, bits: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        bits = bits.contiguous()
        n, h, w, _ = bits.shape
        x = _empty_map(n, channels, h, w, dtype)
        words_of_it = native_memory(bits)
        native().unbinarize(n * h * w, channels, words_of_it, typed_memory(x), thread_count())
        return x

    def bmaxpool2d(
        self, bits: Tensor, channels: int, pool: Pool2dGeometry, take_and: Tensor | None
    ) -> Tensor:
        bits, take_and = bits.contiguous(), contiguous(take_and)
        n, h, w, count = bits.shape
        out = _empty_words(n, *pool.output_size(h, w), count)
        native().maxpool(
            n,
            h,
            w,
            channels,
            pool_values(pool),
            native_memory(bits),
            native_memory(take_and),
            native_memory(out),
            thread_count(),
        )
        return out

    def bconv2d(
        self, bits: Tensor, weight: Tensor, geometry: Conv2dGeometry, prepacked: Tensor | None
    ) -> Tensor:
        bits = bits.contiguous()
        prepacked = self._prepacked(weight, geometry, prepacked)
        n, h, w, _ = bits.shape
        dots = _empty_map(n, geometry.out_channels, *geometry.output_size(h, w), torch.int32)
        conv = native().Conv(geometry_values(geometry), native_memory(prepacked))
        conv.accumulate(n, h, w, native_memory(bits), native_memory(dots), thread_count())
        return dots

    def bconv2d_fused(
        self,
        bits: Tensor,
        weight: Tensor,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        residual: Tensor | None,
        prepacked: Tensor | None,
        float_dtype: torch.dtype | None,
        want_bits: bool,
        gate: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        prepacked = self._prepacked(weight, geometry, prepacked)
        return _Fused(geometry, epilogue, prepacked, float_dtype, want_bits)(bits, residual, gate)

    def bind_fused(
        self,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        prepacked: Tensor,
        float_dtype: torch.dtype | None,
        want_bits: bool,
    ) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
        return _Fused(geometry, epilogue, prepacked.contiguous(), float_dtype, want_bits)

    def bmatmul(self, a: Tensor, b: Tensor, shape: MatrixShape) -> Tensor:
        n, rows, width, _ = a.shape
        sums = _empty_map(n, b.shape[2], rows * shape.groups, width, torch.int32)
        self._matmul(a, b, shape, MatrixScale(1.0), None, sums)
        return sums

    def bmatmul_float(
        self, a: Tensor, b: Tensor, shape: MatrixShape, scale: MatrixScale, dtype: torch.dtype
    ) -> Tensor:
        n, rows, width, _ = a.shape
        out = _empty_map(n, b.shape[2], rows * shape.groups, width, dtype)
        self._matmul(a, b, shape, scale, out, None)
        return out

    def _matmul(
        self,
        a: Tensor,
        b: Tensor,
        shape: MatrixShape,
        scale: MatrixScale,
        out: Tensor | None,
        sums: Tensor | None,
    ) -> None:
        a, b = a.contiguous(), b.contiguous()
        sizes = (a.shape[1], a.shape[2], b.shape[2], *astuple(shape))
        native().matmul(
            a.shape[0],
            sizes,
            astuple(scale),
            native_memory(a),
            native_memory(b),
            typed_memory(out),
            native_memory(sums),
            thread_count(),
        )

    def weight_linear(
        self,
        x: Tensor,
        weight: Tensor,
        multiplier: Tensor,
        bias: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        rows = x.float().contiguous()
        out = rows.new_empty((*rows.shape[:-1], weight.shape[0]))
        held = [contiguous(value) for value in (weight, multiplier, bias, offset)]
        native().weight_linear(
            rows.numel() // rows.shape[-1],
            rows.shape[-1],
            weight.shape[0],
            native_memory(rows),
            *map(native_memory, held),
            native_memory(out),
            thread_count(),
        )
        return out.to(x.dtype)

    def _prepacked(
        self, weight: Tensor, geometry: Conv2dGeometry, prepacked: Tensor | None
    ) -> Tensor:
        return self.prepack(weight, geometry) if prepacked is None else prepacked.contiguous()
