"""What a user would deploy on a CPU in place of an engine: all of it, for one batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, fx, nn

from biper_engine.bench.rivals.binary_convolution import UnsupportedGraphError, binary_model
from biper_engine.bench.rivals.onnx_files import CALIBRATION_IMAGES, export_float, quantize
from biper_engine.bench.rivals.onnx_runtime import REST_MS, OnnxRuntimeNetwork
from biper_engine.bench.rivals.open_vino import OpenVinoNetwork, has_bf16
from biper_engine.bench.rivals.rival import Rival, check_images, checked, first_line, missing
from biper_engine.conversion.twin import float_twin, folded_network
from biper_engine.engine import Engine

__all__ = ["FloatNetworks", "deployed_rivals", "openvino_float_rivals"]

_FAILURES = (RuntimeError, ValueError, OSError, UnsupportedGraphError)
_ONNX = ("onnx", "onnxscript")
_TWIN = "the float twin"


@dataclass(frozen=True)
class FloatNetworks:
    """A model as graphs with constants folded.

    Attributes:
        network: what the model computes, signs of activations included.
        twin: the same layers in float, without those signs.
    """

    network: fx.GraphModule
    twin: fx.GraphModule

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> FloatNetworks:
        """Make both; not in `torch.inference_mode`, whose tensors PyTorch cannot compile with.

        Raises:
            ConversionError: the model cannot be captured.
        """
        return cls(network=folded_network(model, images), twin=float_twin(model, images))


class _Network(Protocol):
    def __call__(self, images: Tensor) -> Tensor: ...

    def bind(self, images: Tensor) -> Callable[[], Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """How a rival is made, and what it must agree with.

    Attributes:
        name, how: of the rival.
        modules: what it imports.
        make: loads or compiles it.
        wanted, beside: of the rival.
        share: of the images that must agree; None where answers are only compared.
        rest_ms: of the rival.
    """

    name: str
    how: str
    modules: tuple[str, ...]
    make: Callable[[], _Network]
    wanted: Callable[[Tensor], Tensor]
    beside: str = _TWIN
    share: float | None = None
    rest_ms: float = 0.0


def deployed_rivals(
    engine: Engine, networks: FloatNetworks, images: Tensor, threads: int
) -> list[Rival]:
    """Return every runtime with every precision, checked where it must agree; none is timed.

    The float twin on OpenVINO in float32, bfloat16 and int8; the engine's own graph on OpenVINO's
    BinaryConvolution, in float32 and bfloat16 otherwise; the float twin on ONNX Runtime in float32
    and int8.

    Args:
        engine: takes and returns one tensor.
        networks: of the same layers as the engine.
        images: the batch; runtimes compile for its shape.
        threads: of each.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = _OnnxFiles(Path(folder), networks.twin, images)
        recipes = [*_openvino(files, threads), *_openvino_binary(engine, images, threads)]
        recipes += _onnx_runtime(files, threads)
        return [_rival(recipe, images) for recipe in recipes]


def openvino_float_rivals(
    network: fx.GraphModule, model: nn.Module, images: Tensor, threads: int
) -> list[Rival]:
    """Return a float network on OpenVINO in float32, checked, and in bfloat16; none is timed.

    Args:
        network: the model with its constants folded (`folded_network`).
        model: the network in PyTorch, in eval mode, which float32 must agree with.
        images: the batch; OpenVINO compiles for its shape.
        threads: of each.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipes = _openvino_float(_OnnxFiles(Path(folder), network, images), threads)
        return [
            _rival(replace(recipe, wanted=model, beside="PyTorch"), images) for recipe in recipes
        ]


def _rival(recipe: _Recipe, images: Tensor) -> Rival:
    rival = Rival(
        name=recipe.name,
        how=recipe.how,
        wanted=recipe.wanted,
        beside=recipe.beside,
        rest_ms=recipe.rest_ms,
    )
    reason = missing(*recipe.modules)
    if reason:
        return replace(rival, reason=reason)
    try:
        network = recipe.make()
        network(images)
    except _FAILURES as error:
        return replace(rival, reason=first_line(error))
    rival = replace(rival, call=network, bind=network.bind)
    if recipe.share is None:
        return rival
    return checked(rival, check_images(images), share=recipe.share)


class _OnnxFiles:
    """ONNX files of the float twin in a folder, each written when it is first asked for."""

    def __init__(self, folder: Path, twin: fx.GraphModule, images: Tensor) -> None:
        self._folder, self._twin, self._images = folder, twin, images

    def outputs(self, images: Tensor) -> Tensor:
        """Return what the files must compute, as PyTorch does."""
        result: Tensor = self._twin(images)[0]
        return result

    @cached_property
    def float32(self) -> Path:
        path = self._folder / "float32.onnx"
        export_float(self._twin, self._images, path)
        return path

    @cached_property
    def int8(self) -> Path:
        path = self._folder / "int8.onnx"
        quantize(self.float32, path, tuple(self._images.shape))
        return path


def _onnx_runtime(files: _OnnxFiles, threads: int) -> list[_Recipe]:
    modules = (*_ONNX, "onnxruntime")
    return [
        _Recipe(
            name="ONNX Runtime f32",
            how="the float twin in float32",
            modules=modules,
            make=lambda: OnnxRuntimeNetwork(files.float32, threads),
            wanted=files.outputs,
            share=1.0,
            rest_ms=REST_MS,
        ),
        _Recipe(
            name="ONNX Runtime int8",
            how=(
                "the float twin, quantized (QDQ): uint8 activations, int8 weights with a scale per "
                f"channel, ranges of {CALIBRATION_IMAGES} random images"
            ),
            modules=modules,
            make=lambda: OnnxRuntimeNetwork(files.int8, threads),
            wanted=files.outputs,
            rest_ms=REST_MS,
        ),
    ]


def _openvino_float(files: _OnnxFiles, threads: int) -> list[_Recipe]:
    modules = (*_ONNX, "openvino")
    return [
        _Recipe(
            name="OpenVINO f32",
            how="the float twin in float32, LATENCY hint, one stream",
            modules=modules,
            make=lambda: OpenVinoNetwork(files.float32, threads, "f32"),
            wanted=files.outputs,
            share=1.0,
        ),
        _Recipe(
            name="OpenVINO bf16",
            how="the float twin in bfloat16",
            modules=modules,
            make=lambda: _in_bf16(files.float32, threads),
            wanted=files.outputs,
        ),
    ]


def _openvino(files: _OnnxFiles, threads: int) -> list[_Recipe]:
    return [
        *_openvino_float(files, threads),
        _Recipe(
            name="OpenVINO int8",
            how="the file that ONNX Runtime int8 runs, float32 where it is not quantized",
            modules=(*_ONNX, "onnxruntime", "openvino"),
            make=lambda: OpenVinoNetwork(files.int8, threads, "f32"),
            wanted=files.outputs,
        ),
    ]


def _openvino_binary(engine: Engine, images: Tensor, threads: int) -> list[_Recipe]:
    def model() -> Any:
        return binary_model(engine.graph_module, tuple(images.shape))

    how = "the engine's graph on BinaryConvolution (opset1, xnor-popcount)"
    return [
        _Recipe(
            name="OpenVINO binary f32",
            how=f"{how}, float32 otherwise",
            modules=("openvino",),
            make=lambda: OpenVinoNetwork(model(), threads, "f32"),
            wanted=engine,
            beside="the engine",
            share=0.5,
        ),
        _Recipe(
            name="OpenVINO binary bf16",
            how=f"{how}, bfloat16 otherwise",
            modules=("openvino",),
            make=lambda: _in_bf16(model(), threads),
            wanted=engine,
            beside="the engine",
        ),
    ]


def _in_bf16(model: Any, threads: int) -> OpenVinoNetwork:
    if not has_bf16():
        raise RuntimeError("OpenVINO does not compute in bfloat16 on this processor")
    return OpenVinoNetwork(model, threads, "bf16")
