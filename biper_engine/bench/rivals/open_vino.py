"""Run networks on OpenVINO's CPU plugin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from biper_engine.bench.callers import Streams, paced

__all__ = ["OpenVinoNetwork", "OpenVinoStreams", "has_bf16"]

_NO_WORK = ("Input", "Output", "Const")
_REQUESTS = 2  # per stream: one runs, the other is ready when it ends


def has_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoNetwork:
    """A compiled model that runs one image after the other (LATENCY), in one stream.

    Args:
        model: path of an ONNX file, or an `openvino.Model`; static shapes, one input, one output.
        threads: INFERENCE_NUM_THREADS.
        precision: "f32" or "bf16". By default, the plugin may use bfloat16 if the processor
            has it.
        options: other properties.

    Raises:
        RuntimeError: OpenVINO cannot read or compile the model.
    """

    def __init__(self, model: Any, threads: int, precision: str, **options: Any) -> None:
        import openvino

        core = openvino.Core()
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            **options,
        }
        # Weights that are mapped from the file would be lost with the file.
        core.set_property({"ENABLE_MMAP": False})
        self._openvino = openvino
        self._model = core.compile_model(model, "CPU", options)

    def __call__(self, images: Tensor) -> Tensor:
        """Return outputs for images."""
        return self._bound(images, self._model.create_infer_request())().clone()

    def bind(self, images: Tensor) -> Callable[[], Any]:
        """Return a call on images whose result is overwritten by the next call."""
        return self._bound(images, self._model.create_infer_request())

    def kernels(self) -> dict[str, int]:
        """Return how many nodes run each kind of kernel, such as "Convolution jit_avx2_I8"."""
        counts = Counter[str]()
        for node in self._model.get_runtime_model().get_ops():
            info = node.get_rt_info()
            layer, kernel = (info[key].astype(str) for key in ("layerType", "primitiveType"))
            if layer not in _NO_WORK:
                counts[f"{layer} {kernel}"] += 1
        return dict(sorted(counts.items()))

    def _bound(self, images: Tensor, request: Any) -> _Bound:
        """Give a request its own images to read and its own memory to write to."""
        batch = images.clone(memory_format=torch.contiguous_format)
        result = torch.full(tuple(self._model.output(0).shape), torch.nan)
        request.set_input_tensor(self._openvino.Tensor(batch.numpy(), shared_memory=True))
        request.set_output_tensor(self._openvino.Tensor(result.numpy(), shared_memory=True))
        return _Bound(request, batch, result)


class OpenVinoStreams(OpenVinoNetwork):
    """A compiled model for as many images per second as possible (THROUGHPUT).

    Args:
        model: as for `OpenVinoNetwork`.
        threads: INFERENCE_NUM_THREADS, of all streams together.
        streams: NUM_STREAMS.

    Raises:
        RuntimeError: OpenVINO cannot read or compile the model, or makes more or fewer streams.
    """

    def __init__(self, model: Any, threads: int, streams: int) -> None:
        options = {"NUM_STREAMS": streams, "PERFORMANCE_HINT": "THROUGHPUT"}
        super().__init__(model, threads, "f32", **options)
        made = self._model.get_property("NUM_STREAMS")
        if made != streams:
            raise RuntimeError(f"OpenVINO makes {made} streams of {threads} threads, not {streams}")
        self._requests = _REQUESTS * streams

    def bind(self, images: Tensor) -> Streams:
        """Return requests on images, twice as many as streams; a result is overwritten later."""
        queue = self._openvino.AsyncInferQueue(self._model, self._requests)
        return _Queue(queue, [self._bound(images, request) for request in queue])


@dataclass(frozen=True)
class _Bound:
    """A request, and the memory of its tensors."""

    request: Any
    batch: Tensor
    result: Tensor

    def __call__(self) -> Tensor:
        self.request.infer(share_outputs=True)
        return self.result


class _Queue(Streams):
    """An AsyncInferQueue: it gives the next idle request to any free stream."""

    def __init__(self, queue: Any, bound: list[_Bound]) -> None:
        self._queue, self._bound = queue, bound
        self.at_once = len(bound)

    def __call__(self) -> list[Tensor]:
        """Start every request once and wait for all of them."""
        for _ in self._bound:  # idle requests are taken in the order in which they became idle
            self._queue.start_async()
        self._queue.wait_all()
        return [bound.result for bound in self._bound]

    def rate(self, seconds: float, warmup_seconds: float) -> float:
        """Return the requests that finish per second.

        Starts are counted: once all requests run, one starts for each that has finished.
        """
        begin = perf_counter() + warmup_seconds
        started = paced(self._queue.start_async, begin, begin + seconds)
        self._queue.wait_all()
        return started
