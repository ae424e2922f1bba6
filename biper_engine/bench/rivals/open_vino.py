"""Networks on OpenVINO's CPU plugin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["OpenVinoNetwork", "has_bf16"]


def has_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoNetwork:
    """A compiled model for one image after the other (LATENCY), in one stream.

    Args:
        model: path of an ONNX file, or an `openvino.Model`; static shapes, one input, one output.
        threads: INFERENCE_NUM_THREADS.
        precision: "f32" or "bf16". Left alone the plugin may take bfloat16 where the processor
            has it.

    Raises:
        RuntimeError: OpenVINO cannot read or compile the model.
    """

    def __init__(self, model: Any, threads: int, precision: str) -> None:
        import openvino

        core = openvino.Core()
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        # Weights in the file's own memory would be lost with the file.
        core.set_property({"ENABLE_MMAP": False})
        self._openvino = openvino
        self._model = core.compile_model(model, "CPU", options)

    def __call__(self, images: Tensor) -> Tensor:
        """Return outputs for images."""
        outputs: Tensor = self.bind(images)()
        return outputs.clone()

    def bind(self, images: Tensor) -> Callable[[], Any]:
        """Return a call on images whose result is overwritten by the next call."""
        batch = images.contiguous(memory_format=torch.contiguous_format).numpy()
        result = torch.empty(tuple(self._model.output(0).shape))
        request = self._model.create_infer_request()
        request.set_input_tensor(self._openvino.Tensor(batch, shared_memory=True))
        request.set_output_tensor(self._openvino.Tensor(result.numpy(), shared_memory=True))
        return _Bound(request, batch, result)


@dataclass(frozen=True)
class _Bound:
    """A request, and the memory that its tensors show."""

    request: Any
    batch: Any
    result: Tensor

    def __call__(self) -> Tensor:
        self.request.infer(share_outputs=True)
        return self.result
