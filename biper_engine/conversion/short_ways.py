"""Shapes of frequent results, without PyTorch's long way to them.

With a symbolic batch, PyTorch finds the shape of a result by running the operator's decomposition
on tensors without data: 10 ms for a batch norm or a clamp, most of the time of a trace. The
results here have the sizes and strides of the first argument, as PyTorch's have
(tests/conversion/test_short_ways.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

__all__ = ["ShapeMode"]

aten = torch.ops.aten

_MAPS = frozenset(
    (
        *(aten.abs.default, aten.clamp.default, aten.hardtanh.default, aten.leaky_relu.default),
        *(aten.neg.default, aten.relu.default, aten.sigmoid.default, aten.sign.default),
    )
)
"""Operators of one tensor, and of numbers, that act on each element."""
_BATCH_NORM = aten._native_batch_norm_legit_no_training.default


class ShapeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Tensors without data; the results of frequent operators take a short way."""

    def dispatch(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not kwargs and args and _is_plain(args[0], self):
            if func in _MAPS and all(isinstance(a, Real) or a is None for a in args[1:]):
                return self._like(args[0])
            if func is _BATCH_NORM and _fits_batch_norm(*args):
                return (self._like(args[0]), *(self._empty(args[0]) for _ in range(2)))
        return super().dispatch(func, types, args, kwargs or {})

    def _like(self, x: FakeTensor) -> FakeTensor:
        return self._made(x, x.size(), x.stride())

    def _empty(self, x: FakeTensor) -> FakeTensor:
        return self._made(x, (0,), (1,))

    def _made(self, x: FakeTensor, sizes: Sequence[Any], strides: Sequence[Any]) -> FakeTensor:
        with no_python_dispatcher(), in_kernel_invocation_manager(self):
            values = torch.empty_strided(sizes, strides, dtype=x.dtype, device="meta")
        return FakeTensor(self, values, x.device)


def _is_plain(x: Any, mode: FakeTensorMode) -> bool:
    """Whether a tensor is of a mode, has values of a float type, and is contiguous."""
    return (
        isinstance(x, FakeTensor)
        and x.fake_mode is mode
        and x.constant is None
        and x.dtype.is_floating_point
        and x.is_contiguous()
    )


def _fits_batch_norm(x: FakeTensor, *args: Any) -> bool:
    """Whether weight, bias, mean and variance are of the type of `x`, one for each channel."""
    return x.dim() >= 2 and all(
        isinstance(p, torch.Tensor) and p.dtype == x.dtype and p.shape == x.shape[1:2]
        for p in args[:4]
    )
