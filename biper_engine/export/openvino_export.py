"""Write OpenVINO files, checked on its CPU plugin before they are written."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from biper_engine.bits import binarize
from biper_engine.converted import ConvertedNetwork
from biper_engine.errors import ExportError
from biper_engine.export.check import Run, compare
from biper_engine.export.onnx_export import require_modules
from biper_engine.export.openvino_graph import Translated, translate
from biper_engine.export.report import ExportReport
from biper_engine.files import write_atomically

__all__ = ["write"]

_CALLS = 4


def write(network: ConvertedNetwork, path: Path, batch: int = 1) -> ExportReport:
    """Write NAME.xml and NAME.bin with binary layers as BinaryConvolution, for one batch size."""
    if path.suffix != ".xml":
        raise ExportError(f"OpenVINO's files end in .xml (and .bin), but `path` is '{path}'.")
    for spec in network.signature.inputs:
        if spec.dtype != torch.float32:
            raise ExportError(f"OpenVINO's files take float32, but the input is {spec}.")
    require_modules("OpenVINO", "openvino")
    import openvino

    shapes = [
        [batch if size is None else size for size in spec.shape]
        for spec in network.signature.inputs
    ]
    translated = translate(network.graph_module, shapes)
    for spec, parameter in zip(
        network.signature.inputs, translated.model.get_parameters(), strict=True
    ):
        if spec.shape[:1] == (None,):  # so that `openvino.set_batch` can change it
            parameter.set_layout(openvino.Layout("N..."))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, path.name)
        openvino.save_model(translated.model, made, compress_to_fp16=False)
        parts = [(path.with_suffix(end), made.with_suffix(end)) for end in (".bin", ".xml")]
        data = {target: source.read_bytes() for target, source in parts}
    runtime = f"openvino {openvino.__version__.partition('-')[0]}"
    agreement = compare(network, _runner(translated), runtime, [batch] * _CALLS)
    for target, contents in data.items():  # the .xml, which names the other, comes last
        write_atomically(target, partial(_write_all, contents))
    on_bits = sum(op.get_type_name() == "BinaryConvolution" for op in translated.model.get_ops())
    return ExportReport(
        path=str(path),
        format="openvino",
        contents=f"OpenVINO with {on_bits} BinaryConvolutions, batch {batch}",
        file_bytes=sum(map(len, data.values())),
        agreement=agreement,
        notes=tuple(translated.float_layers),
    )


def _write_all(contents: bytes, file: BinaryIO) -> None:
    file.write(contents)


def _runner(translated: Translated) -> Run:
    """Return what runs the model in float32.

    The float maps before the signs are further outputs. The signs themselves, FakeQuantizes before
    BinaryConvolutions, cannot be: OpenVINO's plugin then reads memory that is not there.
    """
    import openvino

    model, outputs = translated.model, len(translated.model.outputs)
    model.add_outputs([bits.source.output(0) for bits in translated.signs])
    core = openvino.Core()
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = core.compile_model(model, "CPU", options)

    def run(inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        made = compiled([x.numpy() for x in inputs])
        results = [torch.from_numpy(made[at].copy()) for at in range(len(compiled.outputs))]
        signs = [
            binarize(x, bits.threshold.view(1, -1, 1, 1), bits.sense.view(1, -1, 1, 1)).float()
            for x, bits in zip(results[outputs:], translated.signs, strict=True)
        ]
        return results[:outputs], signs

    return run
