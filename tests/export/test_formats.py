"""Files of other programs hold what the engine computes, or are not written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import biper_engine
from biper_engine import ExportError
from biper_engine.cli import main
from biper_engine.export import FORMATS, onnx_export, openvino_export
from biper_engine.shipped import shipped_file
from tests.networks_by_hand import GraphBuilder, classifier, engine_of, signature, two_inputs

aten = torch.ops.aten
IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def needs(*names: str) -> None:
    for name in names:
        pytest.importorskip(name, reason='pip install "biper-engine[export]"')


def in_runtime(path: Path, *inputs: torch.Tensor) -> list[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})


def operators(path: Path) -> Counter[str]:
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model)
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.some(1)
@pytest.mark.parametrize("format", ["onnx", "qonnx"])
def test_onnx_runs_with_any_batch_and_gives_the_engines_logits(format: str, tmp_path: Path) -> None:
    needs("onnx", "onnxscript", "onnxruntime")
    engine, path = classifier(), tmp_path / "net.onnx"
    report = engine.export(path, format)
    assert report.agreement is not None
    assert report.agreement.bits_differ == 0
    assert report.agreement.top1 == 1.0
    assert report.file_bytes == path.stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    for count in (1, 5):
        (logits,) = in_runtime(path, IMAGES[:count])
        wanted = engine(IMAGES[:count])
        assert torch.allclose(
            torch.from_numpy(logits), wanted, atol=1e-4 * float(wanted.abs().max())
        )
    counts = operators(path)
    assert (counts["Where"] > 0) == (format == "onnx")
    # Three maps of signs, and the weights of three binary layers.
    assert counts["BipolarQuant"] == (6 if format == "qonnx" else 0)


def test_a_trained_network_has_the_same_answer_everywhere(tmp_path: Path) -> None:
    needs("onnx", "onnxscript", "onnxruntime", "openvino")
    import openvino

    with shipped_file("digits/resnet20_1w1a") as path:
        engine = biper_engine.load(path)
    for name in ("a.onnx", "a.xml"):
        report = engine.export(tmp_path / name)
        assert report.agreement is not None
        assert report.agreement.bits_differ == 0
    image = torch.rand(1, *engine.input_shape, generator=torch.Generator().manual_seed(1))
    wanted = engine(image)
    compiled = openvino.Core().compile_model(
        tmp_path / "a.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for logits in (in_runtime(tmp_path / "a.onnx", image)[0], compiled([image.numpy()])[0]):
        # Sums of floats in another order, over some 20 layers.
        assert torch.allclose(
            torch.from_numpy(logits), wanted, atol=1e-5 * float(wanted.abs().max())
        )


def test_the_exports_inputs_and_outputs_have_names(tmp_path: Path) -> None:
    needs("onnx", "onnxscript", "onnxruntime")
    import onnx

    report = two_inputs().export(tmp_path / "two.onnx")
    assert report.format == "onnx"
    graph = onnx.load(tmp_path / "two.onnx").graph
    assert [value.name for value in graph.input] == ["image", "mask"]
    assert [value.name for value in graph.output] == ["output_0", "output_1", "output_2"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def odd_engine() -> biper_engine.Engine:
    """A network with an operator that no format has."""
    g = GraphBuilder()
    result = g.call("odd", torch.ops.aten.special_bessel_j0.default, g.input("image"))
    return engine_of(g.module(result), signature({"image": (3, 8, 8)}, (0,), {}, 0))


@pytest.mark.parametrize(("name", "package"), [("odd.onnx", "onnxscript"), ("odd.xml", "openvino")])
def test_an_operator_without_a_form_is_named_and_nothing_written(
    name: str, package: str, tmp_path: Path
) -> None:
    needs(package)
    with pytest.raises(
        ExportError, match=r"The operator '.*bessel_j0.*' (has no|is not)"
    ) as caught:
        odd_engine().export(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_that_disagrees_leaves_an_older_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("onnx", "onnxscript", "onnxruntime")
    runner = onnx_export._runner

    def wrong(*given: Any) -> Callable[..., Any]:
        run = runner(*given)
        return lambda inputs: ([x + 1 for x in run(inputs)[0]], run(inputs)[1])

    monkeypatch.setattr(onnx_export, "_runner", wrong)
    (tmp_path / "net.onnx").write_text("older")
    with pytest.raises(ExportError, match="so nothing was written"):
        classifier().export(tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_text() == "older"


@pytest.mark.deep
def test_without_its_runtime_a_file_says_that_it_was_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("onnx", "onnxscript")
    find_spec = onnx_export.importlib.util.find_spec
    hidden = lambda name: None if name == "onnxruntime" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", hidden)
    report = classifier().export(tmp_path / "net.onnx")
    assert report.agreement is None
    assert "not checked: onnxruntime is not installed" in str(report)


@pytest.mark.parametrize(("name", "package"), [("a.onnx", "onnxscript"), ("a.xml", "openvino")])
def test_a_missing_package_is_named(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=f'{package} .* not installed: pip install "biper-engine'):
        classifier().export(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_format_is_known_or_refused(tmp_path: Path) -> None:
    engine = classifier()
    with pytest.raises(ExportError, match=r"`format` \(='tflite'\) is no format .* onnx, qonnx"):
        engine.export(tmp_path / "a", "tflite")
    with pytest.raises(
        ExportError, match=r"the name '.*a.bin' is no format .* \.onnx, \.xml, \.pt2"
    ):
        engine.export(tmp_path / "a.bin")
    with pytest.raises(ExportError, match=r"`batch` \(=2\) is for openvino"):
        engine.export(tmp_path / "a.onnx", batch=2)
    with pytest.raises(ExportError, match=r"end in \.xml"):
        engine.export(tmp_path / "a.bin", "openvino")
    with pytest.raises(ExportError, match=r"end in \.pt2"):
        engine.export(tmp_path / "a.so", "aoti")
    assert set(FORMATS) == {"onnx", "qonnx", "openvino", "aoti"}


def test_openvino_gets_binary_convolutions_and_another_batch(tmp_path: Path) -> None:
    needs("openvino")
    import openvino

    engine, path = classifier(), tmp_path / "net.xml"
    report = engine.export(path, batch=2)
    assert report.agreement is not None
    assert (report.agreement.bits_differ, report.agreement.images) == (0, 8)
    # Channels of the first two layers do not fill bytes: these stay float, and are named.
    assert "1 BinaryConvolutions, batch 2" in report.contents
    assert [note.partition(":")[0] for note in report.notes] == ["layer1_0", "layer1_1"]
    core = openvino.Core()
    model = core.read_model(path)
    openvino.set_batch(model, 5)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    logits, wanted = torch.from_numpy(compiled([IMAGES.numpy()])[0]), engine(IMAGES)
    assert torch.allclose(logits, wanted, atol=1e-4 * float(wanted.abs().max()))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.bin", "net.xml"]
    assert openvino_export._CALLS == 4


@pytest.mark.deep
def test_a_package_of_aotinductor_has_the_engines_bits(tmp_path: Path) -> None:
    engine, path = classifier(), tmp_path / "net.pt2"
    report = engine.export(path)
    assert report.agreement is not None
    assert report.agreement.top1 == 1.0
    loaded = torch._inductor.aoti_load_package(str(path))
    for count in (1, 5):
        assert torch.allclose(loaded(IMAGES[:count]), engine(IMAGES[:count]), atol=1e-5)


@pytest.mark.deep
def test_the_command_writes_beside_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("onnx", "onnxscript", "onnxruntime")
    classifier().save(tmp_path / "net.biper")
    assert main(["export", str(tmp_path / "net.biper")]) == 0
    said = capsys.readouterr().out
    assert "net.onnx: ONNX in standard operators, opset 18" in said
    assert "checked with onnxruntime" in said
    assert main(["export", str(tmp_path / "net.biper"), "--format", "qonnx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"].endswith("net.qonnx.onnx")
    assert main(["export", str(tmp_path / "net.biper"), "-o", str(tmp_path / "net.gif")]) == 1
    assert "is no format to export to" in capsys.readouterr().err
