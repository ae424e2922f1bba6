"""Write a network as ONNX files: float32, and int8 with scales from a few images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.export.onnx_file import onnx_model, quiet

__all__ = ["CALIBRATION_IMAGES", "INPUT", "export_float", "quantize"]

CALIBRATION_IMAGES, INPUT = 8, "images"


def export_float(network: fx.GraphModule, images: Tensor, path: Path) -> None:
    """Write a network as ONNX in float32, with the batch of `images` fixed.

    Args:
        network: takes images, returns a tuple of one tensor.
        images: [N, C, H, W] float32; their values do not matter.
        path: path of the file, which holds the weights, too.

    Raises:
        ExportError: PyTorch cannot export the network.
        OSError: the file cannot be written.
    """
    path.write_bytes(onnx_model(network, [images], [INPUT]).SerializeToString())


def quantize(source: Path, target: Path, shape: tuple[int, ...]) -> None:
    """Quantize a float ONNX file to int8: QuantizeLinear and DequantizeLinear around layers.

    Activations are uint8 with one scale, weights int8 with a scale per output channel. Scales come
    from the ranges over seeded random images: `CALIBRATION_IMAGES`, or one batch if that is more.

    Args:
        source: from `export_float`.
        target: file to write.
        shape: shape of the images, including the batch.

    Raises:
        ValueError, RuntimeError: onnxruntime cannot quantize the network.
        OSError: a file cannot be read or written.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_suffix(".prepared.onnx")
    with quiet():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(target),
            _images(shape),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def _images(shape: tuple[int, ...]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    generator = torch.Generator().manual_seed(2)
    batches = -(-CALIBRATION_IMAGES // shape[0])
    images = [torch.randn(shape, generator=generator).numpy() for _ in range(batches)]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._remaining = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._remaining, None)
            return None if batch is None else {INPUT: batch}

    return Reader()
