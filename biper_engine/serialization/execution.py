"""Run a graph's nodes one at a time, in the same way for proofs and for checks of backends."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.graph.choice import prepack_node
from biper_engine.graph.reading import is_bconv2d
from biper_engine.ops.backends import use_backend

__all__ = ["call_node", "digest", "exactly", "forced"]


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, row-major and little endian."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def forced(backend: str | None) -> AbstractContextManager[None]:
    """Force a backend if one is given."""
    return nullcontext() if backend is None else use_backend(backend)


@contextmanager
def exactly() -> Iterator[None]:
    """Compute like an engine: without gradients, and in the graph's dtypes."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        if torch.cuda.is_available():
            with torch.autocast("cuda", enabled=False):
                yield
        else:
            yield


def call_node(node: fx.Node, args: tuple[Any, ...], kwargs: Any, *, prepack: bool) -> Any:
    """Run one node; if `prepack`, with weights re-laid as in the engine's plan."""
    assert callable(node.target)
    if prepack and is_bconv2d(node):
        kwargs = {**kwargs, "prepacked": prepack_node(node, args[1])}
    return node.target(*args, **kwargs)
