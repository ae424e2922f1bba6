"""The CUDA backend: `csrc/cuda` behind the vocabulary.

The compiled module is loaded when it is first needed, never at import.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from biper_engine.bits import words
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops.backends import Backend
from biper_engine.ops.cuda_layout import (
    Layout,
    bit_limits,
    layout_of,
    plain_signs,
    prepacked_stem,
    prepacked_words,
)
from biper_engine.ops.epilogue import Epilogue
from biper_engine.ops.matrix import MATRIX_OPERATORS
from biper_engine.ops.native_arguments import (
    STREAM_TYPES,
    channels_last,
    contiguous,
    geometry_values,
    memory,
    pool_values,
    typed_memory,
)
from biper_engine.ops.stem import Stem

__all__ = ["CudaBackend", "Native", "description"]

_NO_POOL = Pool2dGeometry()


# -- the compiled module --------------------------------------------------------------------------


class Native:
    """The compiled module and the devices that it runs on.

    Args:
        module: `biper_engine._cuda`.
    """

    device_type = "cuda"

    def __init__(self, module: ModuleType) -> None:
        self.module: Any = module
        self._refusals: dict[int, str | None] = {}

    def refusal(self, device: torch.device) -> str | None:
        """Return why the kernels do not run on a device, or None; checked once.

        The driver may be older than the toolkit that compiled them, or they may not be compiled
        for the device's compute capability.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._refusals:
            reason = None
            try:
                with self.on(device):
                    self.module.device_properties()
            except RuntimeError as error:
                reason = f"its kernels do not run on {device} ({error})"
            self._refusals[index] = reason
        return self._refusals[index]

    def on(self, device: torch.device) -> Any:
        """Return a context that makes a device the current one."""
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        """Return the address of the stream that this thread's calls are queued on."""
        return torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _load() -> tuple[Native | None, str | None]:
    """Return the compiled module, or None and the reason why it cannot run here."""
    if not torch.cuda.is_available():
        cause = "this build of PyTorch is for CPUs" if torch.version.cuda is None else "no CUDA GPU"
        return None, cause
    try:
        module = importlib.import_module("biper_engine._cuda")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "biper_engine._cuda"
        cause = "was not built" if missing else f"cannot be loaded ({error})"
        return None, (
            f"the extension biper_engine._cuda {cause}; install the CUDA toolkit (nvcc), then "
            "biper-engine again with BIPER_CUDA=1"
        )
    return Native(module), None


def description() -> str:
    """Return the devices and their compute capabilities, such as "NVIDIA H100 (9.0)".

    Raises:
        BackendUnavailableError: the cuda backend cannot run here.
    """
    from biper_engine.ops.backends import by_name

    by_name("cuda")
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} ({major}.{minor})")
    return ", ".join(names)


# -- calls ----------------------------------------------------------------------------------------


def _empty_map(like: Tensor, n: int, c: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return like.new_empty((n, *size, c), dtype=dtype).permute(0, 3, 1, 2)


def _layout(geometry: Conv2dGeometry, native: Native) -> Layout:
    chunk_words = native.module.fragment_words(geometry.in_channels, geometry.taps)
    return layout_of(geometry, chunk_words)


def _strided(x: Tensor) -> tuple[int, int, int]:
    """Return address, elements to the end of the memory, and type of a map with any strides."""
    elements = x.untyped_storage().nbytes() // x.element_size() - int(x.storage_offset())
    return x.data_ptr(), elements, STREAM_TYPES[x.dtype]


class _Conv:
    """A convolution with fixed weights and epilogue, ready to run on images of any size."""

    def __init__(
        self,
        native: Native,
        geometry: Conv2dGeometry,
        prepacked: Tensor,
        epilogue: Epilogue | None = None,
        limits: tuple[Tensor, Tensor] | None = None,
        path: int = 0,
        processors: int = 0,
    ) -> None:
        layout = _layout(geometry, native)
        parts = torch.split(prepacked, [layout.fragments, layout.sums, layout.taps])
        tensors: dict[str, Tensor] = {}
        options: dict[str, Any] = {}
        if epilogue is not None:
            tensors = {name: value.contiguous() for name, value in epilogue.tensors().items()}
            options = {"clamp_min": epilogue.clamp_min, "clamp_max": epilogue.clamp_max}
        if limits is not None:
            tensors |= {"first": limits[0], "span": limits[1]}
        self._pool = _NO_POOL if epilogue is None else epilogue.pool
        self._native, self._geometry = native, geometry
        self._kept = (prepacked, tensors)  # the native object has their addresses
        self._conv = native.module.Conv(
            geometry_values(geometry),
            pool_values(self._pool),
            fragments=memory(parts[0]) if layout.fragments else None,
            sums=memory(parts[1]) if layout.fragments else None,
            words=memory(parts[2]),
            path=path,
            processors=processors,
            **{name: memory(value) for name, value in tensors.items()},
            **options,
        )

    def accumulate(self, bits: Tensor) -> Tensor:
        """Return the accumulators."""
        bits = bits.contiguous()
        n, h, w, _ = bits.shape
        size = self._geometry.output_size(h, w)
        dots = _empty_map(bits, n, self._geometry.out_channels, size, torch.int32)
        self._run(bits, None, None, None, dots)
        return dots

    def fused(
        self,
        bits: Tensor,
        residual: Tensor | None,
        float_dtype: torch.dtype | None,
        want_bits: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the float map, the packed map, or both."""
        bits = bits.contiguous()
        floats, packed = self._outputs(bits, float_dtype, want_bits)
        residual = None if residual is None else channels_last(residual)
        self._run(bits, residual, floats, packed, None)
        return floats, packed

    def way(
        self,
        bits: Tensor,
        residual: Tensor | None,
        float_dtype: torch.dtype | None,
        want_bits: bool,
    ) -> Any:
        """Return how this call of `fused` runs: a ConvWay of csrc/cuda/bconv.h."""
        floats, packed = self._outputs(bits, float_dtype, want_bits)
        with self._native.on(bits.device):
            return self._conv.way(**self._flowing(bits, residual, floats, packed, None))

    def _outputs(
        self, bits: Tensor, float_dtype: torch.dtype | None, want_bits: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        n, h, w, _ = bits.shape
        channels = self._geometry.out_channels
        size = self._geometry.output_size(h, w)
        if not self._pool.is_identity:
            size = self._pool.output_size(*size)
        floats = packed = None
        if float_dtype is not None:
            floats = _empty_map(bits, n, channels, size, float_dtype)
        if want_bits:
            packed = bits.new_empty((n, *size, words(channels)))
        return floats, packed

    @staticmethod
    def _flowing(
        bits: Tensor,
        residual: Tensor | None,
        floats: Tensor | None,
        packed: Tensor | None,
        dots: Tensor | None,
    ) -> dict[str, Any]:
        return {
            "image": bits.shape[:3],
            "bits": memory(bits),
            "residual": typed_memory(residual),
            "floats": typed_memory(floats),
            "packed": memory(packed),
            "dots": memory(dots),
        }

    def _run(
        self,
        bits: Tensor,
        residual: Tensor | None,
        floats: Tensor | None,
        packed: Tensor | None,
        dots: Tensor | None,
    ) -> None:
        with self._native.on(bits.device):
            stream = self._native.stream(bits.device)
            self._conv.run(**self._flowing(bits, residual, floats, packed, dots), stream=stream)


class _Stem:
    """A stem whose weights are laid out once for every device that it runs on."""

    def __init__(self, native: Native, stem: Stem) -> None:
        self._native, self._stem = native, stem
        self._type = STREAM_TYPES[stem.compute_dtype]
        names = ("bias", "scale", "offset", "threshold", "sense")
        self._vectors = {name: contiguous(getattr(stem, name)) for name in names}
        with native.on(stem.weight.device):
            self._tensor_cores: bool = native.module.stem_has_tensor_cores(self._type)
        self._weight = prepacked_stem(
            *(stem.weight, stem.stride[1], stem.compute_dtype), tensor_cores=self._tensor_cores
        )

    def run(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the float map, the packed map, or both."""
        stem, native = self._stem, self._native
        n, _, h, w = x.shape
        channels, _, *kernel = stem.weight.shape
        size = stem.output_size(h, w)
        out = packed = None
        if stem.want_float:
            out = _empty_map(x, n, channels, size, stem.compute_dtype)
        if stem.want_bits:
            packed = x.new_empty((n, *size, words(channels)), dtype=torch.int32)
        with native.on(x.device):
            native.module.stem(
                x=_strided(x),
                sizes=x.shape,
                strides=x.stride(),
                weight=memory(self._weight),
                out=typed_memory(out),
                bits=memory(packed),
                compute=self._type,
                tensor_cores=self._tensor_cores,
                channels=channels,
                kernel=kernel,
                stride=stem.stride,
                padding=stem.padding,
                pool=pool_values(stem.pool),
                clamp_min=stem.clamp_min,
                clamp_max=stem.clamp_max,
                stream=native.stream(x.device),
                **{name: memory(value) for name, value in self._vectors.items()},
            )
        return out, packed


class CudaBackend(Backend):
    """Kernels of csrc/cuda, on NVIDIA GPUs.

    Args:
        load: returns the module, or None and the reason why it cannot run.
    """

    name = "cuda"
    device_types = ("cuda",)

    def __init__(self, load: Callable[[], tuple[Native | None, str | None]] = _load) -> None:
        self._load = load

    @property
    def _native(self) -> Native:
        native = self._load()[0]
        assert native is not None
        return native

    def unavailable_reason(self) -> str | None:
        return self._load()[1]

    def unsupported_reason(
        self, op: str, geometry: Conv2dGeometry | None, device: torch.device
    ) -> str | None:
        if op in MATRIX_OPERATORS:
            return "it has no kernel for products of matrices"
        native = self._native
        if device.type != native.device_type:
            return f"it runs on {native.device_type} devices, but the tensors are on {device}"
        return native.refusal(device)

    def prepack_layout(self, geometry: Conv2dGeometry) -> tuple[tuple[int, ...], torch.dtype]:
        return (_layout(geometry, self._native).total,), torch.int32

    def prepack(self, weight: Tensor, geometry: Conv2dGeometry) -> Tensor:
        return prepacked_words(weight, geometry, _layout(geometry, self._native))

    def binarize(self, x: Tensor, threshold: Tensor | None, sense: Tensor | None) -> Tensor:
        n, c, h, w = x.shape
        threshold, sense = contiguous(threshold), contiguous(sense)
        packed = x.new_empty((n, h, w, words(c)), dtype=torch.int32)
        with self._native.on(x.device):
            self._native.module.binarize(
                x=_strided(x),
                sizes=x.shape,
                strides=x.stride(),
                threshold=memory(threshold),
                sense=memory(sense),
                bits=memory(packed),
                stream=self._native.stream(x.device),
            )
        return packed

    def unbinarize(self, bits: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        bits = bits.contiguous()
        n, h, w, _ = bits.shape
        x = _empty_map(bits, n, channels, (h, w), dtype)
        with self._native.on(bits.device):
            self._native.module.unbinarize(
                bits=memory(bits),
                x=typed_memory(x),
                sizes=x.shape,
                stream=self._native.stream(bits.device),
            )
        return x

    def bmaxpool2d(
        self, bits: Tensor, channels: int, pool: Pool2dGeometry, take_and: Tensor | None
    ) -> Tensor:
        bits, take_and = bits.contiguous(), contiguous(take_and)
        n, h, w, count = bits.shape
        out = bits.new_empty((n, *pool.output_size(h, w), count))
        with self._native.on(bits.device):
            self._native.module.bmaxpool2d(
                bits=memory(bits),
                take_and=memory(take_and),
                out=memory(out),
                sizes=(n, channels, h, w),
                pool=pool_values(pool),
                stream=self._native.stream(bits.device),
            )
        return out

    def bconv2d(
        self, bits: Tensor, weight: Tensor, geometry: Conv2dGeometry, prepacked: Tensor | None
    ) -> Tensor:
        prepacked = self._prepacked(weight, geometry, prepacked)
        return _Conv(self._native, geometry, prepacked).accumulate(bits)

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
        conv = _Conv(self._native, geometry, prepacked, epilogue)
        return conv.fused(bits, residual, float_dtype, want_bits)

    def stem(self, x: Tensor, stem: Stem) -> tuple[Tensor | None, Tensor | None]:
        return self.bind_stem(stem)(x)

    def bind_stem(self, stem: Stem) -> Callable[[Tensor], tuple[Tensor | None, Tensor | None]]:
        return _Stem(self._native, stem).run

    def pooled_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight, bias = channels_last(x), weight.contiguous(), contiguous(bias)
        out = x.new_empty((x.shape[0], weight.shape[0]))
        with self._native.on(x.device):
            self._native.module.pooled_linear(
                x=typed_memory(x),
                sizes=x.shape,
                weight=typed_memory(weight),
                bias=typed_memory(bias),
                classes=weight.shape[0],
                out=typed_memory(out),
                stream=self._native.stream(x.device),
            )
        return out

    def bind_fused(
        self,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        prepacked: Tensor,
        float_dtype: torch.dtype | None,
        want_bits: bool,
    ) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
        limits = None
        if want_bits and float_dtype is None:
            limits = bit_limits(epilogue, geometry.reduction)
        conv = _Conv(self._native, geometry, prepacked, plain_signs(epilogue), limits)

        def run(bits: Tensor, residual: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            return conv.fused(bits, residual, float_dtype, want_bits)

        return run

    def _prepacked(
        self, weight: Tensor, geometry: Conv2dGeometry, prepacked: Tensor | None
    ) -> Tensor:
        return self.prepack(weight, geometry) if prepacked is None else prepacked.contiguous()
