"""Write a converted network in the formats of other programs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from biper_engine.converted import ConvertedNetwork
from biper_engine.errors import ExportError
from biper_engine.export import aoti, onnx_export, openvino_export
from biper_engine.export.report import ExportReport

__all__ = ["FORMATS", "export"]

Writer = Callable[[ConvertedNetwork, Path], ExportReport]

FORMATS: Mapping[str, Writer] = {
    "onnx": onnx_export.write_standard,
    "qonnx": onnx_export.write_qonnx,
    "openvino": openvino_export.write,
    "aoti": aoti.write,
}
"""What writes each format."""

_SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".pt2": "aoti"}


def export(
    network: ConvertedNetwork,
    path: str | os.PathLike[str],
    format: str | None = None,
    batch: int | None = None,
) -> ExportReport:
    """Write a network for another program, and compare that program's answers with the engine's.

    Args:
        network: of an engine on a CPU.
        path: the file to write.
        format: one of `FORMATS`, or None to take it from the name of the file.
        batch: batch size of an OpenVINO file, whose binary convolutions need a fixed one; 1 if
            None. In the other formats it is free.

    Raises:
        ExportError: the network has no such form, a package is missing, or the other program gives
            other answers; nothing is written.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    target = Path(path)
    name = _SUFFIXES.get(target.suffix.lower()) if format is None else format
    if name is None or name not in FORMATS:
        came = f"`format` (={format!r})" if format is not None else f"the name '{target}'"
        raise ExportError(
            f"{came} is no format to export to: pass format= one of {', '.join(FORMATS)}, or a "
            f"name that ends in {', '.join(_SUFFIXES)}."
        )
    if network.device is not None and network.device.type != "cpu":
        raise ExportError(
            f"The engine is on {network.device}, but exports are made on a CPU: call "
            '`engine.to("cpu")` first.'
        )
    if batch is None:
        return FORMATS[name](network, target)
    if name != "openvino":
        raise ExportError(f"`batch` (={batch}) is for openvino; in {name} files the batch is free.")
    return openvino_export.write(network, target, batch)
