"""Run the float twin on ONNX Runtime's CPU provider, from float32 and int8 ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from biper_engine.bench.callers import Callers, Streams
from biper_engine.bench.rivals.onnx_files import INPUT

__all__ = ["REST_MS", "OnnxRuntimeNetwork", "OnnxRuntimeSessions"]

REST_MS = 60.0
"""How long a session's threads spin after a run. On two cores, OpenVINO takes 1.7 to 2 times its
time alone if it is called within 20 ms of a run, and its time alone after 60 ms. The session option
that ends the spinning costs the next run up to 30 %."""


class OnnxRuntimeNetwork:
    """An ONNX file in a session of ONNX Runtime.

    Args:
        path: the file; it is read immediately.
        threads: threads within an operator; operators run one after the other.

    Raises:
        OSError: the file cannot be read.
        ValueError: onnxruntime cannot run the network.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        refusals = (state.Fail, state.InvalidGraph, state.NotImplemented, state.RuntimeException)
        try:
            self._session = onnxruntime.InferenceSession(
                path.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
        except refusals as error:  # they derive directly from Exception
            raise ValueError(str(error)) from error

    def __call__(self, images: Tensor) -> Tensor:
        """Return outputs for images."""
        outputs: Tensor = self.bind(images)()
        return outputs.clone()

    def bind(self, images: Tensor) -> Callable[[], Any]:
        """Return a call on images whose result is overwritten by the next call."""
        import onnxruntime

        batch = images.clone(memory_format=torch.contiguous_format).numpy()
        (output,) = self._session.get_outputs()
        result = torch.full(output.shape, torch.nan)
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(a) for a in (batch, result.numpy())]
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(INPUT, values[0])
        binding.bind_ortvalue_output(output.name, values[1])
        return _Bound(self._session, binding, values, result)

    def kernels(self) -> dict[str, int]:
        """Return nothing: ONNX Runtime does not tell."""
        return {}


class OnnxRuntimeSessions:
    """An ONNX file in several sessions of one thread, each with its own caller.

    Args:
        path: the file; it is read immediately.
        sessions: number of sessions.

    Raises:
        OSError, ValueError: as for `OnnxRuntimeNetwork`.
    """

    def __init__(self, path: Path, sessions: int) -> None:
        self._networks = [OnnxRuntimeNetwork(path, 1) for _ in range(sessions)]

    def __call__(self, images: Tensor) -> Tensor:
        """Return outputs for images."""
        return self._networks[0](images)

    def bind(self, images: Tensor) -> Streams:
        """Return a caller for each session; a result is overwritten by the next call."""
        return Callers([network.bind(images) for network in self._networks])

    def kernels(self) -> dict[str, int]:
        """Return nothing: ONNX Runtime does not tell."""
        return {}


@dataclass(frozen=True)
class _Bound:
    """A session, and the memory that is bound to it."""

    session: Any
    binding: Any
    values: list[Any]
    result: Tensor

    def __call__(self) -> Tensor:
        self.session.run_with_iobinding(self.binding)
        return self.result
