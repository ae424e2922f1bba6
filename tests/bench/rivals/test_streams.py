"""Rivals with several concurrent calls, on a network of one layer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from biper_engine.bench.callers import Streams
from biper_engine.bench.rivals.onnx_files import INPUT
from biper_engine.bench.rivals.onnx_runtime import OnnxRuntimeSessions
from biper_engine.bench.rivals.open_vino import OpenVinoNetwork, OpenVinoStreams
from biper_engine.export.onnx_file import OPSET

IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def openvino_model() -> Any:
    """Return a model that doubles what is positive."""
    ov = pytest.importorskip("openvino", reason='pip install "biper-engine[bench]"')
    from openvino import opset1

    images = opset1.parameter(list(IMAGES.shape), np.float32)
    doubled = opset1.multiply(opset1.relu(images), np.float32(2))
    return ov.Model([opset1.result(doubled)], [images], "doubled")


def onnx_file(folder: Path) -> Path:
    """Return a file that does the same."""
    onnx = pytest.importorskip("onnx", reason='pip install "biper-engine[bench]"')
    pytest.importorskip("onnxruntime", reason='pip install "biper-engine[bench]"')
    from onnx import helper

    shape = list(IMAGES.shape)
    nodes = [helper.make_node("Relu", [INPUT], ["r"]), helper.make_node("Add", ["r", "r"], ["y"])]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in (INPUT, "y")]
    graph = helper.make_graph(nodes, "doubled", ends[:1], ends[1:])
    opset = [helper.make_opsetid("", OPSET)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "y.onnx")
    return folder / "y.onnx"


def require_doubled(outputs: list[Tensor], count: int) -> None:
    assert len(outputs) == count
    assert all(torch.equal(output, 2 * IMAGES.relu()) for output in outputs)


def require_streams(bound: Streams, count: int) -> None:
    assert bound.at_once == count
    require_doubled(bound(), count)
    assert bound.rate(0.0, 0.0) > 0
    require_doubled(bound(), count)


def test_every_request_of_openvino_has_an_answer_of_its_own() -> None:
    network = OpenVinoStreams(openvino_model(), 1, 1)
    require_doubled([network(IMAGES)], 1)
    require_streams(network.bind(IMAGES), 2)


def test_streams_that_openvino_does_not_make_are_refused() -> None:
    with pytest.raises(RuntimeError, match="OpenVINO makes 1 streams of 1 threads, not 2"):
        OpenVinoStreams(openvino_model(), 1, 2)


def test_the_kernels_of_openvino_are_counted() -> None:
    kernels = OpenVinoNetwork(openvino_model(), 1, "f32").kernels()
    assert sum(kernels.values()) >= 1
    assert not any(name.startswith(("Input", "Output", "Const")) for name in kernels)
    assert all(len(name.split()) == 2 for name in kernels)


def test_every_session_of_onnx_runtime_has_an_answer_of_its_own(tmp_path: Path) -> None:
    network = OnnxRuntimeSessions(onnx_file(tmp_path), 3)
    require_doubled([network(IMAGES)], 1)
    assert network.kernels() == {}
    require_streams(network.bind(IMAGES), 3)
