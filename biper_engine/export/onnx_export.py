"""Write ONNX files, checked in ONNX Runtime before they are written."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from biper_engine.converted import ConvertedNetwork
from biper_engine.errors import ExportError
from biper_engine.export.check import Run, compare, example_inputs
from biper_engine.export.float_form import float_form
from biper_engine.export.onnx_file import onnx_model, sign_outputs, to_qonnx
from biper_engine.export.report import Agreement, ExportReport
from biper_engine.files import write_atomically

__all__ = ["require_modules", "write_qonnx", "write_standard"]


def write_standard(network: ConvertedNetwork, path: Path) -> ExportReport:
    """Write the network in ONNX's standard operators: binary layers are floats of -1 and 1."""
    return _write(network, path, _standard(network), "onnx", "ONNX in standard operators")


def write_qonnx(network: ConvertedNetwork, path: Path) -> ExportReport:
    """Write the network in ONNX with signs and binary weights as QONNX's BipolarQuant."""
    standard = _standard(network)
    return _write(network, path, to_qonnx(standard), "qonnx", "ONNX with QONNX's BipolarQuant")


def require_modules(format: str, *names: str) -> None:
    """Require Python packages.

    Raises:
        ExportError: one is missing; the message says how to install all.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"Exporting to {format} needs {' and '.join(names)}, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed: pip install "
            f'"biper-engine[export]", or {" ".join(missing)} alone.'
        )


def _standard(network: ConvertedNetwork) -> Any:
    require_modules("ONNX", "onnx", "onnxscript")
    specs = network.signature.inputs
    inputs = example_inputs(specs, 2)
    outputs = network.signature.out_spec.num_leaves
    return onnx_model(
        float_form(network.graph_module, inputs),
        inputs,
        [spec.name for spec in specs],
        batched=[spec.shape[:1] == (None,) for spec in specs],
        outputs=["output"] if outputs == 1 else [f"output_{at}" for at in range(outputs)],
    )


def _write(
    network: ConvertedNetwork, path: Path, model: Any, format: str, contents: str
) -> ExportReport:
    agreement, unchecked = _check(network, model)
    data = model.SerializeToString()
    write_atomically(path, lambda file: file.write(data))
    return ExportReport(
        path=str(path),
        format=format,
        contents=f"{contents}, opset {model.opset_import[0].version}",
        file_bytes=len(data),
        agreement=agreement,
        unchecked=unchecked,
    )


def _check(network: ConvertedNetwork, model: Any) -> tuple[Agreement | None, str | None]:
    if importlib.util.find_spec("onnxruntime") is None:
        return None, "onnxruntime is not installed; pip install onnxruntime, then export again"
    import onnxruntime

    names = [spec.name for spec in network.signature.inputs]
    run = _runner(sign_outputs(model), names, network.signature.out_spec.num_leaves)
    return compare(network, run, f"onnxruntime {onnxruntime.__version__}"), None


def _runner(model: Any, names: Sequence[str], outputs: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def run(inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        results = [torch.from_numpy(x) for x in session.run(None, given)]
        return results[:outputs], results[outputs:]

    return run
