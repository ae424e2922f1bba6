"""The backends that run operators, what each can do, and the choice between them.

Backends are tried in the order of `PREFERENCE`. The first that is available and supports the device
and the call runs it. `use_backend` or the environment variable `BIPER_BACKEND` forces one: if the
forced backend cannot run a call, it raises with its reason, and no other is chosen.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from biper_engine.errors import BackendUnavailableError
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops.environment import Variable
from biper_engine.ops.epilogue import Epilogue
from biper_engine.ops.matrix import MatrixScale, MatrixShape
from biper_engine.ops.matrix_reference import unpack_weight
from biper_engine.ops.stem import Stem

__all__ = [
    "PREFERENCE",
    "Backend",
    "BackendInfo",
    "backends",
    "by_name",
    "refusal",
    "select",
    "use_backend",
]

_VARIABLE = Variable("BIPER_BACKEND")
PREFERENCE = ("cuda", "triton", "cpu", "reference")


class Backend(ABC):
    """One implementation of the vocabulary of `functional`; arguments are already checked."""

    name: str
    device_types: tuple[str, ...] | None = None
    """Device types for which it is considered and loaded, unless it is forced; None: all."""
    steps = frozenset({"pool_min", "clamp_min", "clamp_max", "slope", "shift"})
    """The optional steps of the epilogue (see `epilogue.STEPS`) that its kernels have."""

    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """Return why this backend cannot run here at all, or None."""

    @abstractmethod
    def unsupported_reason(
        self, op: str, geometry: Conv2dGeometry | None, device: torch.device
    ) -> str | None:
        """Return why this backend cannot run `op` with `geometry` on `device`, or None."""

    @abstractmethod
    def prepack_layout(self, geometry: Conv2dGeometry) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of `prepack`'s result."""

    @abstractmethod
    def prepack(self, weight: Tensor, geometry: Conv2dGeometry) -> Tensor:
        """Convert canonical packed weights to the layout of this backend."""

    @abstractmethod
    def binarize(self, x: Tensor, threshold: Tensor | None, sense: Tensor | None) -> Tensor:
        """Pack a float map."""

    @abstractmethod
    def unbinarize(self, bits: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        """Unpack a packed map to a +-1 float map."""

    @abstractmethod
    def bmaxpool2d(
        self, bits: Tensor, channels: int, pool: Pool2dGeometry, take_and: Tensor | None
    ) -> Tensor:
        """Max pool a packed map."""

    @abstractmethod
    def bconv2d(
        self, bits: Tensor, weight: Tensor, geometry: Conv2dGeometry, prepacked: Tensor | None
    ) -> Tensor:
        """Integer accumulators."""

    @abstractmethod
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
        """Convolve and apply the epilogue; return a float map, a packed map, or both.

        A gate comes only if `steps` has one.
        """

    def bind_fused(
        self,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        prepacked: Tensor,
        float_dtype: torch.dtype | None,
        want_bits: bool,
    ) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
        """Return `bconv2d_fused` with fixed parameters, a function of bits, residual and gate.

        It is called without the gate if there is none.

        A backend overrides it if it can prepare more than the weights for later calls.
        """
        weight = prepacked.new_empty(0)  # the prepacked weights are used instead

        def run(
            bits: Tensor, residual: Tensor | None, gate: Tensor | None = None
        ) -> tuple[Tensor | None, Tensor | None]:
            operands = (bits, weight, geometry, epilogue, residual, prepacked)
            return self.bconv2d_fused(*operands, float_dtype, want_bits, gate)

        return run

    def stem(self, x: Tensor, stem: Stem) -> tuple[Tensor | None, Tensor | None]:
        """Run a stem on images; return what it wants: a float map, a packed map, or both.

        A backend that does not override this and `pooled_linear` does not support the operators.
        """
        raise NotImplementedError(f"The {self.name} backend has no fused stem.")

    def bind_stem(self, stem: Stem) -> Callable[[Tensor], tuple[Tensor | None, Tensor | None]]:
        """Return `stem` with fixed parameters, a function of the images.

        A backend overrides it if it can prepare the weights for later calls.
        """

        def run(x: Tensor) -> tuple[Tensor | None, Tensor | None]:
            return self.stem(x, stem)

        return run

    def pooled_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply a linear layer to the mean of a float map over its pixels."""
        raise NotImplementedError(f"The {self.name} backend has no fused classifier.")

    def bmatmul(self, a: Tensor, b: Tensor, shape: MatrixShape) -> Tensor:
        """Integer sums of a product of two packed maps, [N, V, H * groups, W] channels_last.

        A backend that does not override this and the next two does not support the operators.
        """
        raise NotImplementedError(f"The {self.name} backend has no products of matrices.")

    def bmatmul_float(
        self, a: Tensor, b: Tensor, shape: MatrixShape, scale: MatrixScale, dtype: torch.dtype
    ) -> Tensor:
        """Multiply two packed maps and scale the sums."""
        raise NotImplementedError(f"The {self.name} backend has no products of matrices.")

    def weight_linear(
        self,
        x: Tensor,
        weight: Tensor,
        multiplier: Tensor,
        bias: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        """Multiply real rows with binary weights."""
        raise NotImplementedError(f"The {self.name} backend has no products of matrices.")

    def unpack_weight(
        self, weight: Tensor, low: Tensor, high: Tensor, channels: int, dtype: torch.dtype
    ) -> Tensor:
        """Unpack weights into two values for each output channel."""
        return unpack_weight(weight, low, high, channels, dtype)

    def bind_pooled_linear(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Return `pooled_linear` with fixed parameters, a function of the map."""

        def run(x: Tensor) -> Tensor:
            return self.pooled_linear(x, weight, bias)

        return run


@dataclass(frozen=True)
class BackendInfo:
    """One row of `backends()`: a name, whether it can run here, and if not, why."""

    name: str
    available: bool
    reason: str | None


_REGISTERED: dict[str, Backend] = {}
_forced: ContextVar[str | None] = ContextVar("biper_backend", default=None)


def register(backend: Backend) -> None:
    """Register a backend; called once per adapter, when the vocabulary is registered."""
    _REGISTERED[backend.name] = backend


def _unavailable_reason(name: str) -> str | None:
    backend = _REGISTERED.get(name)
    if backend is None:
        return f"this version of biper_engine has no {name} kernels"
    return backend.unavailable_reason()


def backends() -> tuple[BackendInfo, ...]:
    """Return every backend in order of preference, with the reason if one cannot run here."""
    reasons = {name: _unavailable_reason(name) for name in PREFERENCE}
    return tuple(BackendInfo(name, reason is None, reason) for name, reason in reasons.items())


def by_name(name: str) -> Backend:
    """Return the backend called `name`.

    Raises:
        BackendUnavailableError: the name is unknown or the backend cannot run here.
    """
    if name not in PREFERENCE:
        close = difflib.get_close_matches(name, PREFERENCE, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise BackendUnavailableError(
            f"Unknown backend {name!r}; the known ones are {', '.join(PREFERENCE)}.{hint}"
        )
    reason = _unavailable_reason(name)
    if reason is not None:
        usable = ", ".join(info.name for info in backends() if info.available)
        raise BackendUnavailableError(
            f"Backend {name!r} cannot run here: {reason}. Available: {usable}."
        )
    return _REGISTERED[name]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every operator called inside the `with` block, in this thread.

    Args:
        name: a name from `backends()`.

    Raises:
        BackendUnavailableError: immediately, if the backend is unknown or cannot run here; inside
            the block, if it cannot run an operator that is called.
    """
    by_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_name() -> str | None:
    """Return the name that `use_backend` or `BIPER_BACKEND` forces, or None."""
    return _forced.get() or _VARIABLE.get()


def refusal(
    backend: Backend,
    op: str,
    geometry: Conv2dGeometry | None,
    device: torch.device,
    steps: frozenset[str],
) -> str | None:
    """Return why a backend cannot run a call, or None; the arguments are those of `select`."""
    missing = sorted(steps - backend.steps)
    if missing:
        return f"its epilogue has no {' and no '.join(missing)} yet"
    return backend.unsupported_reason(op, geometry, device)


def select(
    op: str,
    geometry: Conv2dGeometry | None,
    device: torch.device,
    steps: frozenset[str] = frozenset(),
) -> Backend:
    """Return the backend that runs this call.

    Args:
        op: name of the operator.
        geometry: of a convolution, or None.
        device: where the tensors are.
        steps: names of the optional steps of the epilogue that the call has.

    Raises:
        BackendUnavailableError: the forced backend cannot run it, or no backend can.
    """
    forced = forced_name()
    if forced is not None:
        backend = by_name(forced)
        reason = refusal(backend, op, geometry, device, steps)
        if reason is not None:
            raise BackendUnavailableError(f"Backend {forced!r} cannot run {op}: {reason}.")
        return backend
    refusals = []
    for name in PREFERENCE:
        known = _REGISTERED.get(name)
        if known is not None and known.device_types and device.type not in known.device_types:
            refusals.append(f"{name}: it runs on {' and '.join(known.device_types)} devices")
            continue
        reason = _unavailable_reason(name)
        if reason is None:
            backend = _REGISTERED[name]
            reason = refusal(backend, op, geometry, device, steps)
            if reason is None:
                return backend
        refusals.append(f"{name}: {reason}")
    raise BackendUnavailableError(f"No backend can run {op} on {device}. " + "; ".join(refusals))
