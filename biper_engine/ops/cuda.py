"""The CUDA backend: `csrc/cuda` behind the vocabulary, and its layout of weights.

The compiled module is loaded at the first question about it, never at import.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from biper_engine import bits as contract
from biper_engine.bits import WORD_BITS, words
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops.backends import Backend
from biper_engine.ops.checks import check_prepacked
from biper_engine.ops.epilogue import Epilogue
from biper_engine.ops.reference import apply_epilogue

__all__ = ["CudaBackend", "Native", "bit_limits", "description"]

_STREAM_TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_NO_POOL = Pool2dGeometry()
OLDEST_CAPABILITY = 75
_FRAGMENT_WORDS = 256  # of 32 channels in a step of 256 bits
_STEP_PAIRS = 4  # pairs of words in a step


# -- the compiled module --------------------------------------------------------------------------


class Native:
    """The compiled module and the devices that it runs on.

    Args:
        module: `biper_engine._cuda`.
    """

    device_type = "cuda"

    def __init__(self, module: ModuleType) -> None:
        self.module: Any = module
        self._capabilities: dict[int, int] = {}

    def capability(self, device: torch.device) -> int:
        """Return 10 times the major plus the minor number of a device's compute capability."""
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._capabilities:
            major, minor = torch.cuda.get_device_capability(index)
            self._capabilities[index] = 10 * major + minor
        return self._capabilities[index]

    def on(self, device: torch.device) -> Any:
        """Return a context in which a device is the current one."""
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        """Return the address of the stream that calls from this thread go to."""
        return torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _load() -> tuple[Native | None, str | None]:
    """Return the compiled module, or None and why it cannot run here."""
    try:
        module = importlib.import_module("biper_engine._cuda")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "biper_engine._cuda"
        cause = "was not built" if missing else f"cannot be loaded ({error})"
        return None, (
            f"the extension biper_engine._cuda {cause}; install the CUDA toolkit (nvcc), then "
            "biper-engine again with BIPER_CUDA=1"
        )
    if not torch.cuda.is_available():
        cause = "this build of PyTorch is for CPUs" if torch.version.cuda is None else "no CUDA GPU"
        return None, cause
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


# -- weights --------------------------------------------------------------------------------------


def _masked(weight: Tensor, channels: int) -> Tensor:
    """Return packed weights without the unused bits of their last words."""
    if channels % WORD_BITS == 0:
        return weight
    masked = weight.clone()
    masked[..., -1] &= (1 << channels % WORD_BITS) - 1
    return masked


def _popcount(packed: Tensor) -> Tensor:
    """Return the set bits of every word, int32."""
    return contract.unpack_channels(packed.unsqueeze(-1), WORD_BITS).sum(-1, dtype=torch.int32)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where in the prepacked words each layout of the weights lies; see csrc/cuda.

    Attributes:
        fragments: words of the tensor-core fragments (bconv_mma.cuh); 0 with groups.
        sums: words of the prefix sums over the taps; 0 with groups.
        taps: words tap by tap (bconv_popcount.cuh).
        chunk_words: words of a pixel in one chunk.
        steps: of 256 bits in a chunk.
        chunks: of a pixel.
        blocks: of 32 output channels.
    """

    fragments: int
    sums: int
    taps: int
    chunk_words: int
    steps: int
    chunks: int
    blocks: int

    @property
    def total(self) -> int:
        return self.fragments + self.sums + self.taps


def _layout(geometry: Conv2dGeometry, native: Native) -> _Layout:
    taps = geometry.taps * words(geometry.group_channels) * geometry.out_channels
    if geometry.groups > 1:
        return _Layout(0, 0, taps, 0, 0, 0, 0)
    chunk_words = native.module.fragment_words(geometry.in_channels, geometry.taps)
    chunks = -(-words(geometry.in_channels) // chunk_words)
    steps = -(-geometry.taps * chunk_words // 2 // _STEP_PAIRS)
    blocks = words(geometry.out_channels)
    (kh, kw) = geometry.kernel_size
    return _Layout(
        fragments=blocks * chunks * steps * _FRAGMENT_WORDS,
        sums=(kh + 1) * (kw + 1) * blocks * WORD_BITS,
        taps=taps,
        chunk_words=chunk_words,
        steps=steps,
        chunks=chunks,
        blocks=blocks,
    )


def _fragments(weight: Tensor, geometry: Conv2dGeometry, layout: _Layout) -> Tensor:
    """Return the words in the order in which the lanes of a warp take them.

    `[blocks, chunks, steps, 2, lanes, 4]`: of two groups of 8 channels in turn the pair of words of
    the lane's quarter. Column g of group j is channel `8 * (g // 2) + 2 * j + g % 2` of its block.
    """
    padded = weight.new_zeros(
        (layout.blocks * WORD_BITS, geometry.taps, layout.chunks * layout.chunk_words)
    )
    padded[: geometry.out_channels, :, : weight.shape[-1]] = weight.flatten(1, 2)
    pairs = layout.chunk_words // 2
    ordered = padded.view(layout.blocks, WORD_BITS, geometry.taps, layout.chunks, pairs, 2)
    ordered = ordered.permute(0, 3, 2, 4, 1, 5).flatten(2, 3)  # [blocks, chunks, pairs, 32, 2]
    whole = weight.new_zeros(
        (layout.blocks, layout.chunks, layout.steps * _STEP_PAIRS, WORD_BITS, 2)
    )
    whole[:, :, : ordered.shape[2]] = ordered
    column = torch.arange(8, device=weight.device)
    group = torch.arange(4, device=weight.device).view(2, 1, 2)
    channel = 8 * (column.view(1, 8, 1) // 2) + 2 * group + column.view(1, 8, 1) % 2
    taken = whole[:, :, :, channel.flatten()]
    taken = taken.view(layout.blocks, layout.chunks, layout.steps, _STEP_PAIRS, 2, 8, 2, 2)
    return taken.permute(0, 1, 2, 4, 5, 3, 6, 7).flatten()


def _prefix_sums(weight: Tensor, layout: _Layout) -> Tensor:
    """Return the set bits of the taps above and left of every tap, `[KH + 1, KW + 1, channels]`."""
    counts = _popcount(weight).sum(-1, dtype=torch.int32).permute(1, 2, 0)
    kh, kw, out_channels = counts.shape
    sums = weight.new_zeros((kh + 1, kw + 1, layout.blocks * WORD_BITS))
    sums[1:, 1:, :out_channels] = counts.cumsum(0).cumsum(1).to(torch.int32)
    return sums.flatten()


def bit_limits(epilogue: Epilogue, reduction: int) -> tuple[Tensor, Tensor] | None:
    """Return for which accumulators the epilogue's bit is set, without a residual.

    Every step is monotone in the accumulator, and so is its rounding: the bit is set for those on
    one side of a limit, which is found by bisecting the float steps themselves.

    Args:
        epilogue: with threshold and sense.
        reduction: K; accumulators lie in [-K, K].

    Returns:
        `first` and `span`, int32 [O]: the bit is set for `first <= dot <= first + span`. None where
        a negative slope makes the steps no longer monotone.
    """
    if epilogue.slope is not None and bool((epilogue.slope < 0).any()):
        return None
    steps = dataclasses.replace(epilogue, pool=_NO_POOL, pool_min=None)

    def bit(dot: Tensor) -> Tensor:
        v = apply_epilogue(dot.view(1, -1, 1, 1), steps, None).view(-1)
        return contract.binarize(v, epilogue.threshold, epilogue.sense)

    low = torch.full_like(epilogue.multiplier, -reduction, dtype=torch.int32)
    high = torch.full_like(low, reduction)
    at_low, at_high = bit(low), bit(high)
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        same = bit(middle) == at_low
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    # The bit changes between `low` and `high`, where it changes at all.
    first = torch.where(at_low, -reduction, high)
    last = torch.where(at_high, reduction, low)
    none = ~at_low & ~at_high
    first = torch.where(none, reduction + 1, first)
    last = torch.where(none, reduction + 1, last)
    return first.to(torch.int32), (last - first).to(torch.int32)


def _plain_signs(epilogue: Epilogue) -> Epilogue:
    """Return the epilogue without threshold and sense where its bits are those of `v >= 0`."""
    threshold, sense = epilogue.threshold, epilogue.sense
    if threshold is None or sense is None or bool(((threshold != 0) | sense).any()):
        return epilogue
    return dataclasses.replace(epilogue, threshold=None, sense=None)


# -- calls ----------------------------------------------------------------------------------------


def _memory(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.numel())


def _typed(tensor: Tensor | None) -> tuple[int, int, int] | None:
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.numel(), _STREAM_TYPES[tensor.dtype]


def _channels_last(x: Tensor) -> Tensor:
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _empty_map(like: Tensor, n: int, c: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return like.new_empty((n, *size, c), dtype=dtype).permute(0, 3, 1, 2)


def _geometry_values(geometry: Conv2dGeometry) -> tuple[int, ...]:
    return (
        *(geometry.in_channels, geometry.out_channels, geometry.groups),
        *(*geometry.kernel_size, *geometry.stride, *geometry.padding, *geometry.dilation),
    )


def _pool_values(pool: Pool2dGeometry) -> tuple[int, ...]:
    return (*pool.kernel_size, *pool.stride, *pool.padding)


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
            _geometry_values(geometry),
            _pool_values(self._pool),
            fragments=_memory(parts[0]) if layout.fragments else None,
            sums=_memory(parts[1]) if layout.fragments else None,
            words=_memory(parts[2]),
            path=path,
            **{name: _memory(value) for name, value in tensors.items()},
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
        residual = None if residual is None else _channels_last(residual)
        self._run(bits, residual, floats, packed, None)
        return floats, packed

    def way(
        self,
        bits: Tensor,
        residual: Tensor | None,
        float_dtype: torch.dtype | None,
        want_bits: bool,
    ) -> Any:
        """Return how such a call of `fused` runs: a ConvWay of csrc/cuda/bconv.h."""
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
            "bits": _memory(bits),
            "residual": _typed(residual),
            "floats": _typed(floats),
            "packed": _memory(packed),
            "dots": _memory(dots),
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


class CudaBackend(Backend):
    """Kernels of csrc/cuda, on NVIDIA GPUs.

    Args:
        load: returns the module, or None and why it cannot run.
    """

    name = "cuda"

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
        native = self._native
        if device.type != native.device_type:
            return f"it runs on {native.device_type} devices, the tensors are on {device}"
        capability = native.capability(device)
        if capability < OLDEST_CAPABILITY:
            return (
                f"{device} has compute capability {capability / 10}, and the kernels need "
                f"{OLDEST_CAPABILITY / 10}"
            )
        return None

    def prepack_layout(self, geometry: Conv2dGeometry) -> tuple[tuple[int, ...], torch.dtype]:
        return (_layout(geometry, self._native).total,), torch.int32

    def prepack(self, weight: Tensor, geometry: Conv2dGeometry) -> Tensor:
        layout = _layout(geometry, self._native)
        weight = _masked(weight, geometry.group_channels)
        parts = [weight.permute(1, 2, 3, 0).flatten()]
        if layout.fragments:
            parts = [_fragments(weight, geometry, layout), _prefix_sums(weight, layout), *parts]
        return torch.cat(parts)

    def binarize(self, x: Tensor, threshold: Tensor | None, sense: Tensor | None) -> Tensor:
        raise NotImplementedError

    def unbinarize(self, bits: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def bmaxpool2d(
        self, bits: Tensor, channels: int, pool: Pool2dGeometry, take_and: Tensor | None
    ) -> Tensor:
        raise NotImplementedError

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
    ) -> tuple[Tensor | None, Tensor | None]:
        prepacked = self._prepacked(weight, geometry, prepacked)
        conv = _Conv(self._native, geometry, prepacked, epilogue)
        return conv.fused(bits, residual, float_dtype, want_bits)

    def bind_fused(
        self,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        prepacked: Tensor,
        float_dtype: torch.dtype | None,
        want_bits: bool,
    ) -> Callable[[Tensor, Tensor | None], tuple[Tensor | None, Tensor | None]]:
        limits = None
        if want_bits and float_dtype is None:
            limits = bit_limits(epilogue, geometry.reduction)
        conv = _Conv(self._native, geometry, prepacked, _plain_signs(epilogue), limits)

        def run(bits: Tensor, residual: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            return conv.fused(bits, residual, float_dtype, want_bits)

        return run

    def _prepacked(
        self, weight: Tensor, geometry: Conv2dGeometry, prepacked: Tensor | None
    ) -> Tensor:
        if prepacked is None:
            return self.prepack(weight, geometry)
        check_prepacked(prepacked, *self.prepack_layout(geometry), self.name)
        return prepacked.contiguous()
