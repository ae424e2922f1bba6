"""One file and one image: the same answer in Python, C, ONNX Runtime, OpenVINO and libtorch.

Python and C give the same bytes. The others add floats in another order over some 20 layers, which
changes the logits by less than 1e-5 of the largest; no bit of this image is so near its threshold.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import biper_engine
from biper_engine import Engine, models
from biper_engine.preprocessing import image_to_tensor
from biper_engine.shipped import shipped_file
from tests.c.library import Library, installed, library_in
from tests.examples.aoti_program import built
from tests.native.builds import succeed

NAME, LABEL = "digits/resnet20_1w1a", 7
BOUND = 1e-5

pytestmark = pytest.mark.deep


@pytest.fixture(scope="module")
def file() -> Path:
    with shipped_file(NAME) as path:
        return path


@pytest.fixture(scope="module")
def engine(file: Path) -> Engine:
    return biper_engine.load(file)


@pytest.fixture(scope="module")
def image(engine: Engine) -> Tensor:
    assert engine.metadata is not None
    return image_to_tensor(models.samples(NAME)[LABEL], engine.metadata)[None]


@pytest.fixture(scope="module")
def wanted(engine: Engine, image: Tensor) -> Tensor:
    """Return what Python's engine gives, which names the digit."""
    logits = engine(image)
    assert int(logits.argmax()) == LABEL
    return logits


def require_near(logits: Tensor, wanted: Tensor) -> None:
    assert logits.shape == wanted.shape
    assert int(logits.argmax()) == int(wanted.argmax())
    assert float((logits - wanted).abs().max()) <= BOUND * float(wanted.abs().max())


def test_the_c_library_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, file: Path, image: Tensor, wanted: Tensor
) -> None:
    model = Library(library_in(installed(tmp_path_factory))).load(file)
    pixels = np.asarray(models.samples(NAME)[LABEL])[:, :, None]
    assert model.run(image.numpy())[0].tobytes() == wanted.numpy().tobytes()
    assert model.run_images([pixels])[0].tobytes() == wanted.numpy().tobytes()


def test_the_trained_network_gives_the_same_answer(image: Tensor, wanted: Tensor) -> None:
    with torch.inference_mode():
        require_near(models.pretrained(NAME)(image), wanted)


@pytest.mark.parametrize("format", ["onnx", "qonnx"])
def test_onnx_gives_the_same_answer(
    format: str, engine: Engine, image: Tensor, wanted: Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason='pip install "biper-engine[export]"')
    runtime = pytest.importorskip("onnxruntime", reason='pip install "biper-engine[export]"')
    engine.export(tmp_path / "digits.onnx", format)
    path = str(tmp_path / "digits.onnx")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    require_near(torch.from_numpy(logits), wanted)


def test_openvino_gives_the_same_answer(
    engine: Engine, image: Tensor, wanted: Tensor, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino", reason='pip install "biper-engine[export]"')
    engine.export(tmp_path / "digits.xml")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(tmp_path / "digits.xml", "CPU", options)
    require_near(torch.from_numpy(compiled([image.numpy()])[0]), wanted)


@pytest.mark.weekly
def test_libtorch_in_cpp_gives_the_same_answer(
    tmp_path_factory: pytest.TempPathFactory,
    engine: Engine,
    image: Tensor,
    wanted: Tensor,
    tmp_path: Path,
) -> None:
    engine.export(tmp_path / "digits.pt2")
    image.numpy().tofile(tmp_path / "image.f32")
    words = [tmp_path / "digits.pt2", tmp_path / "image.f32", "1,3,32,32"]
    out = succeed(built(tmp_path_factory), *words)
    require_near(torch.tensor([[float(word) for word in out.split()]]), wanted)
