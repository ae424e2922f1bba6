"""The native CPU backend: `csrc/cpu` behind the vocabulary, and the number of threads that it uses.

The compiled module is loaded at the first question about it, never at import.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from biper_engine.bits import words
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops.backends import Backend
from biper_engine.ops.environment import Variable
from biper_engine.ops.epilogue import Epilogue
from biper_engine.ops.native_arguments import (
    channels_last,
    contiguous,
    geometry_values,
    native_memory,
    pool_values,
    typed_memory,
)
from biper_engine.ops.stem import PLAN_OPERATORS

__all__ = ["CpuBackend", "PopcountPeak", "description", "popcount_peak", "thread_count"]

_VARIABLE = Variable("BIPER_NUM_THREADS")
# Of our own pool, in csrc/cpu/thread_pool.cpp. OpenMP's ends the process where it gets no more.
_MOST_THREADS = 1024
_NO_POOL = (1, 1, 1, 1, 0, 0)


# -- the compiled module --------------------------------------------------------------------------


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """Return the compiled module, or None and why it cannot run here."""
    try:
        native = importlib.import_module("biper_engine._cpu")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "biper_engine._cpu"
        cause = "was not built" if missing else f"cannot be loaded ({error})"
        return None, (
            f"the extension biper_engine._cpu {cause}; install a C++17 compiler (g++ or clang++), "
            "then biper-engine again"
        )
    try:
        native.isa()
        native.use_torch(torch)
    except ValueError as error:
        return None, str(error)
    native.share_threads(_torch_parallel_region())
    native.limit_processors(_cgroup_limit())
    _keep_freed_memory()
    return native, None


def _keep_freed_memory() -> None:
    """Let the C library keep up to 62 MB that were freed, instead of 256 kB to some megabytes.

    glibc gives free memory above twice its largest freed block back to the system, and a large map
    then costs a page fault for every 4 kB, on every call: about 2,000, and a fifth of the time, for
    64 images of 32x32 through a ResNet-20 on a Zen 4. One block of 31 MiB, which nobody touches,
    raises that limit as far as glibc lets it rise by itself (mallopt(3), M_MMAP_THRESHOLD). Without
    effect where MALLOC_MMAP_THRESHOLD_ or MALLOC_TRIM_THRESHOLD_ is set, and on other C libraries.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def _torch_parallel_region() -> int:
    """Return the address of `GOMP_parallel` in the OpenMP runtime that torch runs on, or 0.

    Symbols are looked up in libtorch_cpu and what it depends on, so that it is torch's runtime also
    where other packages bring their own. GCC's and LLVM's runtimes have it on Linux.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    no_load = getattr(os, "RTLD_NOLOAD", 0)
    try:
        function = ctypes.CDLL(
            str(library), mode=no_load | getattr(os, "RTLD_NOW", 0)
        ).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def native() -> Any:
    return _load()[0]


# -- threads --------------------------------------------------------------------------------------


def _quota(text: str) -> int | None:
    """Return the processors that a cgroup's "quota period" allows, rounded up; None: no limit."""
    fields = text.split()
    if len(fields) != 2 or not all(field.lstrip("-").isdigit() for field in fields):
        return None  # "max 100000"
    quota, period = map(int, fields)
    return max(1, -(-quota // period)) if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _cgroup_limit(root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self")) -> int:
    """Return the processors that the control groups of this process allow; many without a limit.

    A limit holds for the groups below it, so every group up to the root counts. Reads `cpu.max` of
    version 2, `cpu.cfs_quota_us` and `cpu.cfs_period_us` of version 1.
    """
    limits = []
    for line in _read(proc / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if not number or not separator:
            continue  # no "number:controllers:path"
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [root / controllers, root / "cpu"] if controllers else [root, root / "unified"]
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            for depth in range(len(parts) + 1):
                group = mount.joinpath(*parts[:depth])
                period = _read(group / "cpu.cfs_period_us")
                limits.append(_quota(_read(group / "cpu.max")))
                limits.append(_quota(f"{_read(group / 'cpu.cfs_quota_us')} {period}"))
    return min((limit for limit in limits if limit is not None), default=1 << 30)


def thread_count() -> int:
    """Return the threads that a call from this thread may use now.

    `BIPER_NUM_THREADS` where it is set; else `torch.get_num_threads()`, but no more than the
    processors that this thread may run on and that the cgroup's quota pays for.

    Raises:
        ValueError: `BIPER_NUM_THREADS` is no integer from 1 to 1024.
    """
    forced = _VARIABLE.get()
    if forced is not None:
        if not forced.isdecimal() or len(forced) > 9 or not 1 <= int(forced) <= _MOST_THREADS:
            shown = forced if len(forced) <= 40 else f"{forced[:40]}..."
            raise ValueError(
                f"BIPER_NUM_THREADS (={shown!r}) must be a positive integer, {_MOST_THREADS:,} at "
                "most. Set it to the number of cores to use, or unset it."
            )
        return int(forced)
    threads = torch.get_num_threads()
    if threads == 1:
        return 1
    processors: int = native().processors()
    return processors if processors < threads else threads


# -- what it is and can ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PopcountPeak:
    """What bounds every binary convolution on one core: its inner loop on registers alone.

    Attributes:
        isa: instruction set in use.
        macs_per_second: multiply-accumulates on bits.
        macs_per_clock: the same by the core's clock, or None where that cannot be counted.
    """

    isa: str
    macs_per_second: float
    macs_per_clock: float | None


def popcount_peak() -> PopcountPeak:
    """Measure this machine's popcount peak for one core; takes about 0.05 s.

    Raises:
        BackendUnavailableError: the cpu backend cannot run here.
    """
    native = _require_native()
    per_second, per_clock = native.measure_peak()
    return PopcountPeak(
        isa=native.isa(), macs_per_second=per_second, macs_per_clock=per_clock or None
    )


def description() -> str:
    """Return the instruction set and the threads in use, such as "avx512, 2 threads".

    Raises:
        BackendUnavailableError: the cpu backend cannot run here.
    """
    threads = thread_count()
    return f"{_require_native().isa()}, {threads} thread{'s' * (threads != 1)}"


def _require_native() -> Any:
    from biper_engine.ops.backends import by_name

    by_name("cpu")
    return native()


# -- calls ----------------------------------------------------------------------------------------


def _empty_map(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last
    return torch.empty((n, c, h, w), dtype=dtype, memory_format=layout, device="cpu")


def _empty_words(n: int, h: int, w: int, count: int) -> Tensor:
    return torch.empty((n, h, w, count), dtype=torch.int32, device="cpu")


def native_conv(geometry: Conv2dGeometry, epilogue: Epilogue, prepacked: Tensor) -> Any:
    """Return a native convolution; `prepacked` must live as long as it does."""
    tensors = {name: value.contiguous() for name, value in epilogue.tensors().items()}
    names = ("multiplier", "bias", "slope", "shift", "threshold", "sense", "pool_min")
    return native().Conv(
        geometry_values(geometry),
        native_memory(prepacked),
        pool=pool_values(epilogue.pool),
        clamp_min=epilogue.clamp_min,
        clamp_max=epilogue.clamp_max,
        **{name: native_memory(tensors.get(name)) for name in names},
    )


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
        self._conv, self._kept = native_conv(geometry, epilogue, prepacked), prepacked
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
        self, bits: Tensor, residual: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        bits = bits.contiguous()
        batch, height, width, _ = bits.shape
        rows, columns = self._output_size(height, width)
        if residual is not None:
            residual = channels_last(residual)
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
            thread_count(),
        )
        return floats, packed


class CpuBackend(Backend):
    """Kernels of csrc/cpu, for the best instruction set that the processor has."""

    name = "cpu"

    def unavailable_reason(self) -> str | None:
        return _load()[1]

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
    ) -> tuple[Tensor | None, Tensor | None]:
        prepacked = self._prepacked(weight, geometry, prepacked)
        return _Fused(geometry, epilogue, prepacked, float_dtype, want_bits)(bits, residual)

    def bind_fused(
        self,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        prepacked: Tensor,
        float_dtype: torch.dtype | None,
        want_bits: bool,
    ) -> Callable[[Tensor, Tensor | None], tuple[Tensor | None, Tensor | None]]:
        return _Fused(geometry, epilogue, prepacked.contiguous(), float_dtype, want_bits)

    def _prepacked(
        self, weight: Tensor, geometry: Conv2dGeometry, prepacked: Tensor | None
    ) -> Tensor:
        return self.prepack(weight, geometry) if prepacked is None else prepacked.contiguous()
