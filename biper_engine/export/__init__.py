"""Converted networks as files of other programs: ONNX, QONNX, OpenVINO, AOTInductor."""

from biper_engine.export.formats import FORMATS, export
from biper_engine.export.report import Agreement, ExportReport

__all__ = ["FORMATS", "Agreement", "ExportReport", "export"]
