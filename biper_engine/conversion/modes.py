"""Modes and defaults of PyTorch that a caller may set, but a conversion must not depend on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch

__all__ = ["callers_defaults", "plain_modes"]

_AUTOCAST_DEVICES = ("cpu", "cuda")
_CALLERS: ContextVar[tuple[torch.dtype, torch.device] | None] = ContextVar("_CALLERS", default=None)


@contextmanager
def plain_modes() -> Iterator[None]:
    """Disable inference mode, gradients and autocast; make new tensors float32 and on the CPU.

    Tensors made in inference mode cannot be saved or changed later, autocast would cast the
    operators of the passes, and thresholds found in another dtype would differ.
    """
    enabled = [name for name in _AUTOCAST_DEVICES if torch.is_autocast_enabled(name)]
    defaults = torch.get_default_dtype(), torch.get_default_device()
    token = _CALLERS.set(_CALLERS.get() or defaults)
    try:
        for name in enabled:
            torch.set_autocast_enabled(name, False)
        plain = _defaults(torch.float32, torch.device("cpu"))
        with torch.inference_mode(False), torch.no_grad(), plain:
            yield
    finally:
        for name in enabled:
            torch.set_autocast_enabled(name, True)
        _CALLERS.reset(token)


@contextmanager
def callers_defaults() -> Iterator[None]:
    """Within `plain_modes`, use the caller's defaults for new tensors, as a model does."""
    defaults = _CALLERS.get()
    if defaults is None:
        yield
    else:
        with _defaults(*defaults):
            yield


@contextmanager
def _defaults(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.get_default_device() != device:
            stack.enter_context(device)
        if before == dtype:
            yield
            return
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
