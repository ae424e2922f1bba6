"""The Triton backend: `kernels/` behind the vocabulary.

Triton is loaded when it is first needed, never at import. Its interpreter (TRITON_INTERPRET=1, read
when Triton is loaded) runs the same kernels on CPU tensors, thousands of times slower. It is used
only if this backend is forced.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from biper_engine import bits as contract
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops.backends import Backend, forced_name
from biper_engine.ops.epilogue import Epilogue
from biper_engine.ops.matrix import MATRIX_OPERATORS
from biper_engine.ops.stem import Stem

__all__ = ["TritonBackend"]

_NO_POOL = Pool2dGeometry()
_LEAST_CAPABILITY = 80  # 10 * major + minor


@functools.cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"biper_engine.kernels.{name}")


@functools.cache
def _load_failure() -> str | None:
    """Return why Triton cannot be imported, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton (Linux only)"
    try:
        _kernels("launch")
    except (ImportError, AttributeError, OSError) as error:
        return f"triton cannot be loaded ({type(error).__name__}: {error}); 3.6 or later is needed"
    return None


@functools.cache
def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; if not, this does not load Triton."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "yes", "on", "y"):
        return False
    return _load_failure() is None and bool(_kernels("launch").INTERPRETED)


@functools.cache
def _unavailable_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return _load_failure()
    if not torch.cuda.is_available() and not _interpreted():
        return (
            "PyTorch has no GPU that it can use; TRITON_INTERPRET=1 runs the kernels in Triton's "
            "interpreter, for tests"
        )
    return _load_failure()


@functools.cache
def _capability_reason(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return None  # `unavailable_reason` says so
    capability: int = _kernels("launch").capability(device)
    if 0 < capability < _LEAST_CAPABILITY:
        found = f"{capability // 10}.{capability % 10}"
        return f"Triton needs compute capability 8.0 or later, {device} has {found}"
    return None


def _uses_popcount(geometry: Conv2dGeometry) -> bool:
    few: int = _kernels("configs").MAX_POPCOUNT_FILTERS
    return geometry.groups > 1 or geometry.out_channels <= few


def _convolution(geometry: Conv2dGeometry) -> ModuleType:
    return _kernels("bconv2d_popcount" if _uses_popcount(geometry) else "bconv2d")


class TritonBackend(Backend):
    """Kernels in Triton, for every GPU that it compiles for."""

    name = "triton"
    device_types = ("cuda",)

    def unavailable_reason(self) -> str | None:
        return _unavailable_reason()

    def unsupported_reason(
        self, op: str, geometry: Conv2dGeometry | None, device: torch.device
    ) -> str | None:
        if device.type not in ("cpu", "cuda"):
            return f"it runs on GPUs, but the tensors are on {device}"
        if op in MATRIX_OPERATORS:
            return "it has no kernel for products of matrices"
        if _interpreted():
            if forced_name() == self.name:
                return None
            return "Triton's interpreter runs only if this backend is forced"
        if device.type == "cpu":
            return "it runs on GPUs, but the tensors are on the CPU"
        return _capability_reason(device)

    def prepack_layout(self, geometry: Conv2dGeometry) -> tuple[tuple[int, ...], torch.dtype]:
        dtype = torch.int32 if _uses_popcount(geometry) else torch.int8
        return _convolution(geometry).layout(geometry), dtype

    def prepack(self, weight: Tensor, geometry: Conv2dGeometry) -> Tensor:
        module = _convolution(geometry)
        if _uses_popcount(geometry):
            prepacked: Tensor = module.prepack(weight, geometry)
        else:
            positive = contract.unpack_weight(weight, geometry.group_channels)
            prepacked = module.prepack(positive, geometry)
        return prepacked

    def binarize(self, x: Tensor, threshold: Tensor | None, sense: Tensor | None) -> Tensor:
        packed: Tensor = _kernels("binarize").binarize(x, threshold, sense)
        return packed

    def unbinarize(self, bits: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        x: Tensor = _kernels("binarize").unbinarize(bits, channels, dtype)
        return x

    def bmaxpool2d(
        self, bits: Tensor, channels: int, pool: Pool2dGeometry, take_and: Tensor | None
    ) -> Tensor:
        size = pool.output_size(bits.shape[1], bits.shape[2])
        pooled: Tensor = _kernels("bmaxpool2d").bmaxpool2d(bits, channels, pool, size, take_and)
        return pooled

    def bconv2d(
        self, bits: Tensor, weight: Tensor, geometry: Conv2dGeometry, prepacked: Tensor | None
    ) -> Tensor:
        size = geometry.output_size(bits.shape[1], bits.shape[2])
        shape = (bits.shape[0], geometry.out_channels, *size)
        outputs = _kernels("convolution").Outputs(bits, shape, accumulators=True)
        prepacked = self._prepacked(weight, geometry, prepacked)
        _convolution(geometry).run(
            bits.contiguous(), prepacked, geometry, _NO_POOL, size, outputs, None, None
        )
        dots: Tensor = outputs.accumulators.permute(0, 3, 1, 2)
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
        conv_size = geometry.output_size(bits.shape[1], bits.shape[2])
        size = conv_size if epilogue.pool.is_identity else epilogue.pool.output_size(*conv_size)
        outputs = _kernels("convolution").Outputs(
            bits,
            (bits.shape[0], geometry.out_channels, *size),
            float_dtype=float_dtype,
            packed=want_bits,
        )
        _convolution(geometry).run(
            bits.contiguous(),
            self._prepacked(weight, geometry, prepacked),
            geometry,
            epilogue.pool,
            conv_size,
            outputs,
            epilogue,
            residual,
        )
        floats = None if outputs.floats is None else outputs.floats.permute(0, 3, 1, 2)
        return floats, outputs.packed

    def stem(self, x: Tensor, stem: Stem) -> tuple[Tensor | None, Tensor | None]:
        conv_size = stem.conv.output_size(x.shape[2], x.shape[3])
        outputs = _kernels("convolution").Outputs(
            x,
            (x.shape[0], stem.weight.shape[0], *stem.output_size(x.shape[2], x.shape[3])),
            float_dtype=stem.compute_dtype if stem.want_float else None,
            packed=stem.want_bits,
        )
        _kernels("stem").run(x, stem, conv_size, outputs)
        floats = None if outputs.floats is None else outputs.floats.permute(0, 3, 1, 2)
        return floats, outputs.packed

    def pooled_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = _kernels("pooled_linear").pooled_linear(x, weight, bias)
        return result

    def _prepacked(
        self, weight: Tensor, geometry: Conv2dGeometry, prepacked: Tensor | None
    ) -> Tensor:
        return self.prepack(weight, geometry) if prepacked is None else prepacked.contiguous()
