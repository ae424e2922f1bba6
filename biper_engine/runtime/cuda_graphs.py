"""The CUDA plan: a network's operators as one CUDA graph for every shape of its inputs.

The first call of a shape runs operator by operator, the second captures a graph, and further calls
replay it: they copy their inputs into the graph's own memory, launch it, and copy the results out.
A batch of at least half the size of a captured one, such as the last batch of a data set, runs on
that graph if the network computes images independently.

Order. Work of a call is on the caller's current stream, as for any PyTorch operator. Every call
writes to the graph's memory. So a call waits on the device for the previous one, if that was on
another stream, and on the host for another thread to finish its launch. Different shapes do not
wait for each other. A graph that is dropped lives until its last launch is done.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from biper_engine.ops.precision import without_tf32
from biper_engine.runtime.cuda_driver import FREE_MEMORY_SHARE, Capture, GraphDriver

__all__ = ["CudaGraphs", "uncapturable_reason"]

MAX_REMEMBERED_SHAPES = 1024
"""Most shapes seen once, or too large for a graph, to remember; then the oldest is dropped."""

_UNSAFE_TAGS = tuple(
    getattr(torch.Tag, name)
    for name in (
        *("data_dependent_output", "dynamic_output_shape"),
        *("cudagraph_unsafe", "nondeterministic_seeded"),
    )
    if hasattr(torch.Tag, name)
)

# One capture at a time in a process, as PyTorch requires.
_capturing = threading.Lock()

_Input = tuple[tuple[int, ...], torch.dtype, bool]  # shape, dtype, whether it is channels_last
_Key = tuple[_Input, ...]


def uncapturable_reason(module: fx.GraphModule) -> str | None:
    """Return why a CUDA graph cannot hold an operator of a network, or None if it can.

    The shapes or numbers from such an operator depend on values, so that the host must wait for
    them, or it is random. Other operators may turn out to be like this in a capture.
    """
    for node in module.graph.nodes:
        tags = node.target.tags if isinstance(node.target, OpOverload) else []
        if any(tag in tags for tag in _UNSAFE_TAGS):
            return f"no CUDA graph can hold {node.name} ({node.target})"
    return None


class CudaGraphs:
    """Runs a network with CUDA graphs; safe from several threads and streams.

    Args:
        run: runs the network, operator by operator, on the device's current stream.
        driver: the device.
        operators: number of operators of the network.
        independent: whether the network computes images independently (see `batching`).
        reason: reason why nothing is captured, or None.
        limit_bytes: memory that all graphs together may hold, with their inputs; None means
            FREE_MEMORY_SHARE of the free memory at the first capture.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        driver: GraphDriver,
        *,
        operators: int,
        independent: bool = False,
        reason: str | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        self._run = run
        self._driver = driver
        self._operators = operators
        self._independent = independent
        self._reason = reason
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()  # for all attributes below
        self._graphs: OrderedDict[_Key, _Graph] = OrderedDict()  # least recently used first
        self._seen: OrderedDict[_Key, None] = OrderedDict()
        self._too_large: OrderedDict[_Key, None] = OrderedDict()

    def __str__(self) -> str:
        with self._lock:
            if self._reason is not None:
                return f"operator by operator, since {self._reason}"
            text = (
                f"one CUDA graph of {self._operators} operator{'s' * (self._operators != 1)} per "
                f"input shape ({len(self._graphs)} captured)"
            )
            large = len(self._too_large)
        if not large:
            return text
        shapes = f"{large} shape{'s' * (large != 1)}"
        return f"{text}, operator by operator for {shapes}, since memory is short"

    @property
    def captured(self) -> tuple[_Key, ...]:
        """The inputs that have graphs, least recently used first."""
        with self._lock:
            return tuple(self._graphs)

    @property
    def memory_bytes(self) -> int:
        """Memory that the graphs hold on the device."""
        with self._lock:
            return sum(graph.memory_bytes for graph in self._graphs.values())

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the network, with the arguments and results of `run`."""
        with self._driver.on_device(), torch.no_grad():
            if self._is_excluded(inputs):
                return self._run_eagerly(inputs)
            key = tuple(map(_input_key, inputs))
            graph = self._find(key)
            if graph is None and self._is_second_call(key):
                graph = self._capture(key, inputs, wait=False)
            if graph is None:
                graph = self._find(key, any_layout=True)
            return self._run_eagerly(inputs) if graph is None else graph.run(inputs)

    def warm_up(self, *inputs: Tensor) -> None:
        """Capture a graph for inputs like these, if there is none."""
        with self._driver.on_device(), torch.no_grad():
            if self._is_excluded(inputs):
                self._run_eagerly(inputs)
                return
            key = tuple(map(_input_key, inputs))
            if key not in self.captured and self._capture(key, inputs, wait=True) is None:
                self._run_eagerly(inputs)

    # -- which graph ------------------------------------------------------------------------------

    def _is_excluded(self, inputs: Sequence[Tensor]) -> bool:
        """Whether a call cannot use a graph: nothing is captured, or the caller is capturing."""
        empty = any(x.numel() == 0 for x in inputs)
        return self._reason is not None or empty or self._driver.is_capturing()

    def _find(self, key: _Key, *, any_layout: bool = False) -> _Graph | None:
        """Return a graph of inputs like these, or of a batch at most twice as large."""
        with self._lock:
            found = key if key in self._graphs else self._fitting(key, any_layout)
            if found is None:
                return None
            self._graphs.move_to_end(found)
            return self._graphs[found]

    def _fitting(self, key: _Key, any_layout: bool) -> _Key | None:
        """Return the graph of the same batch in another layout, or of the next larger batch."""
        rest, batch = _without_batch(key, any_layout), _batch(key)
        found, smallest = None, 0
        for other in self._graphs:
            if _without_batch(other, any_layout) != rest:
                continue
            size = _batch(other)
            if [shape[:1] for shape, _, _ in other] == [shape[:1] for shape, _, _ in key]:
                return other
            if not self._independent or batch is None or size is None:
                continue
            if batch < size <= 2 * batch and (found is None or size < smallest):
                found, smallest = other, size
        return found

    def _is_second_call(self, key: _Key) -> bool:
        with self._lock:
            if key in self._too_large:
                return False
            if key in self._seen:
                return True
            _remember(self._seen, key)
            return False

    # -- capturing --------------------------------------------------------------------------------

    def _capture(self, key: _Key, inputs: Sequence[Tensor], *, wait: bool) -> _Graph | None:
        """Capture a graph, or return None if that is not possible, or not now."""
        if not _capturing.acquire(blocking=wait):
            return None
        try:
            with self._lock:
                if key in self._graphs or self._reason is not None:
                    return self._graphs.get(key)
            return self._keep(key, self._capture_alone(inputs))
        finally:
            _capturing.release()

    def _capture_alone(self, inputs: Sequence[Tensor]) -> _Graph | None:
        """Capture a graph; if memory is short, drop all others and try again."""
        if self._limit_bytes is None:
            self._limit_bytes = int(FREE_MEMORY_SHARE * self._driver.free_bytes())
        handled = sys.exc_info()[1]  # handled by the caller, and not a cause of errors here
        for _ in range(2):
            try:
                return self._captured(inputs)
            except torch.OutOfMemoryError:
                pass
            except RuntimeError as error:
                cause = _first_cause(error, handled)
                with self._lock:
                    self._reason = f"capturing a CUDA graph failed: {cause}"
            self._drop_down_to(0)
            if self._reason is not None:
                break
        return None

    def _captured(self, inputs: Sequence[Tensor]) -> _Graph:
        # Graphs outlive the mode of the call that makes them and must not hold inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            buffers = [self._driver.empty_like(_plain(x)) for x in inputs]
            for buffer, x in zip(buffers, inputs, strict=True):
                buffer.copy_(x, non_blocking=True)
            with without_tf32():
                capture = self._driver.capture(lambda: self._run(*buffers))
            return _Graph(self._driver, buffers, capture)

    def _keep(self, key: _Key, graph: _Graph | None) -> _Graph | None:
        limit = self._limit_bytes or 0
        if graph is None or graph.memory_bytes > limit:
            with self._lock:
                if self._reason is None:
                    _remember(self._too_large, key)
            return None
        self._drop_down_to(limit - graph.memory_bytes)
        with self._lock:
            self._graphs[key] = graph
            self._seen.pop(key, None)
        return graph

    def _drop_down_to(self, limit: int) -> None:
        """Drop least recently used graphs until the others hold at most so many bytes."""
        dropped = []
        with self._lock:
            held = sum(graph.memory_bytes for graph in self._graphs.values())
            while self._graphs and held > limit:
                _, graph = self._graphs.popitem(last=False)
                held -= graph.memory_bytes
                dropped.append(graph)
        # They are freed here, without the lock, since each waits for its last launch.
        dropped.clear()

    def _run_eagerly(self, inputs: Sequence[Tensor]) -> Any:
        with without_tf32():
            return self._run(*map(self._driver.to_device, inputs))


class _Graph:
    """A captured graph with its inputs and outputs; one call at a time."""

    def __init__(self, driver: GraphDriver, buffers: list[Tensor], capture: Capture) -> None:
        self._driver = driver
        self._event = driver.event()
        self._buffers = buffers
        self._graph = capture.graph
        self._outputs = capture.outputs
        self._batch = buffers[0].shape[0] if buffers and buffers[0].dim() else 0
        self._lock = threading.Lock()
        self._stream: int | None = None  # stream of the last call
        self.memory_bytes = capture.memory_bytes + sum(x.nbytes for x in buffers)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """Run on inputs of the captured shape, or of a smaller batch; return new tensors."""
        rows = inputs[0].shape[0] if self._batch else None
        if rows == self._batch:
            rows = None
        with self._lock:
            stream = self._driver.stream()
            if self._stream not in (None, stream):
                self._event.wait()
            self._stream = stream
            for buffer, x in zip(self._buffers, inputs, strict=True):
                # Later rows keep their old values: their results are left out.
                target = buffer if rows is None else buffer[:rows]
                target.copy_(x, non_blocking=True)
            try:
                self._graph.replay()
                return tuple(_copied(value, rows) for value in self._outputs)
            finally:  # also if memory for the copies is short
                self._event.record()

    def __del__(self) -> None:
        # After this, PyTorch owns the memory again and may use it for work of other streams.
        # A caller that is capturing must not wait, and need not wait if the process ends.
        if not sys.is_finalizing() and not self._driver.is_capturing():
            self._event.synchronize()


def _copied(value: Any, rows: int | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return (value if rows is None else value[:rows]).clone()


def _plain(x: Tensor) -> Tensor:
    """Return a tensor without data in one of the two layouts, in place of `x`."""
    form = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=form)


def _is_channels_last(x: Tensor) -> bool:
    return (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def _input_key(x: Tensor) -> _Input:
    return tuple(x.shape), x.dtype, _is_channels_last(x)


def _batch(key: _Key) -> int | None:
    """Return the batch size of all inputs; None if they have none, or several."""
    sizes = {shape[:1] for shape, _, _ in key}
    return next(iter(sizes))[0] if len(sizes) == 1 and () not in sizes else None


def _without_batch(key: _Key, any_layout: bool) -> tuple[Any, ...]:
    return tuple((shape[1:], dtype, any_layout or last) for shape, dtype, last in key)


def _remember(shapes: OrderedDict[_Key, None], key: _Key) -> None:
    shapes[key] = None
    while len(shapes) > MAX_REMEMBERED_SHAPES:
        shapes.popitem(last=False)


def _first_cause(error: BaseException, handled: BaseException | None) -> str:
    """Return the first line of the first error of a chain: the end of a capture also raises."""
    while error.__context__ is not None and error.__context__ is not handled:
        error = error.__context__
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
