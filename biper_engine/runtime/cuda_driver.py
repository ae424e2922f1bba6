"""The interface of a device for CUDA graphs, and its implementation with PyTorch's CUDA.

All code that only a GPU can run is here; `cuda_graphs` decides what is captured and when.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Capture", "CudaDriver", "Event", "GraphDriver", "Replayable", "graph_driver"]

FREE_MEMORY_SHARE = 0.25
"""Share of the free memory, at a network's first capture, that its graphs may hold."""


class Replayable(Protocol):
    """A captured graph."""

    def replay(self) -> None:
        """Launch it on the current stream."""


class Event(Protocol):
    """A point in a stream's work."""

    def record(self) -> None:
        """Record the current end of the current stream's work."""

    def wait(self) -> None:
        """Let further work of the current stream wait for the recorded point."""

    def synchronize(self) -> None:
        """Wait for the recorded point; return at once if there is none."""


@dataclass(frozen=True)
class Capture:
    """The result of capturing a function.

    Attributes:
        graph: repeats the function's work on the same memory.
        outputs: outputs of the function; every replay writes to them.
        memory_bytes: memory that the graph reserves on the device.
    """

    graph: Replayable
    outputs: Any
    memory_bytes: int


class GraphDriver(Protocol):
    """A device that captures graphs."""

    def on_device(self) -> AbstractContextManager[Any]:
        """Make the device the current one; all methods below are called in this context."""

    def is_capturing(self) -> bool:
        """Whether the caller is capturing the current stream."""

    def synchronize(self) -> None:
        """Wait for all work of the device."""

    def stream(self) -> int:
        """Return the identity of the current stream."""

    def to_device(self, x: Tensor) -> Tensor:
        """Return a tensor on the device; from pinned memory without waiting."""

    def empty_like(self, x: Tensor) -> Tensor:
        """Return uninitialised memory on the device for tensors like `x`."""

    def event(self) -> Event:
        """Return a new event."""

    def capture(self, run: Callable[[], Any]) -> Capture:
        """Run a function on another stream, then capture it.

        Raises:
            RuntimeError: it does something that a graph cannot hold, or memory is short.
        """

    def free_bytes(self) -> int:
        """Return the number of bytes that could be allocated now."""


def graph_driver(device: torch.device | None) -> GraphDriver | None:
    """Return the driver of a device; None if PyTorch cannot capture graphs on it."""
    return CudaDriver(device) if device is not None and device.type == "cuda" else None


class CudaDriver:
    """PyTorch's CUDA graphs on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device)

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def stream(self) -> int:
        return int(torch.cuda.current_stream().cuda_stream)

    def to_device(self, x: Tensor) -> Tensor:
        return x.to(self._device, non_blocking=True)

    def empty_like(self, x: Tensor) -> Tensor:
        return torch.empty_like(x, device=self._device, pin_memory=False)

    def event(self) -> Event:
        return torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]

    def capture(self, run: Callable[[], Any]) -> Capture:
        """Run a function on another stream, then capture it there.

        The run before the capture is for work that libraries do once per thread and stream, such as
        choosing algorithms, which a capture does not allow. Each graph has its own memory pool:
        graphs with a common pool would have to wait for each other, and dropping one would free
        nothing. The pool also holds the workspace of cuBLAS, which PyTorch keeps for each of its 32
        streams: it is cleared before the capture, so that the graph makes its own, and after it, so
        that no other graph on that stream takes it and dropping a graph does not give it back. Work
        of other threads does not end the capture.
        """
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
        stream.wait_stream(current)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        capturing = torch.cuda.graph(
            graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        )
        try:
            # If its end raises, `torch.cuda.graph` leaves its stream as the current one.
            with torch.cuda.stream(stream):
                run()
                with capturing:
                    torch._C._cuda_clearCublasWorkspaces()
                    outputs = run()
        except RuntimeError:
            _clean_up(graph, pool)
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        current.wait_stream(stream)
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call, unused-ignore]
        held = sum(s["total_size"] for s in segments if s["segment_pool_id"] == pool)
        return Capture(graph, outputs, held)

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


_failed: list[torch.cuda.CUDAGraph] = []


def _clean_up(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Let PyTorch's allocators continue after a capture whose end raised.

    Before 2.12 they assume that the capture is still active: they no longer free memory, and for
    every allocation they ask the graph whether it owns it, even after the graph is gone. So the
    capture is ended for them, and the graph is kept for the rest of the process.
    Source: pytorch/pytorch#180395.
    """
    try:
        graph.pool()
    except RuntimeError:  # it did not end; otherwise there is nothing to clean up
        _failed.append(graph)
        # It had not begun, PyTorch has done so itself, or an older PyTorch has another name for it.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
