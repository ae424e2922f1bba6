"""Modes of PyTorch that a caller may be in, and that a conversion must not depend on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["plain_modes"]

_AUTOCAST_DEVICES = ("cpu", "cuda")


@contextmanager
def plain_modes() -> Iterator[None]:
    """Leave inference mode, gradients and autocast, as outside of any `with`.

    Tensors made in inference mode cannot be saved or changed later, and autocast would cast the
    operators of the passes themselves. The caller's default dtype and device stay: a model may make
    tensors with them.
    """
    enabled = [name for name in _AUTOCAST_DEVICES if torch.is_autocast_enabled(name)]
    with torch.inference_mode(False), torch.no_grad():
        try:
            for name in enabled:
                torch.set_autocast_enabled(name, False)
            yield
        finally:
            for name in enabled:
                torch.set_autocast_enabled(name, True)
