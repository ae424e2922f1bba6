"""Everything that a user could deploy on a CPU instead of an engine, for one batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from biper_engine.bench.rivals.onnx_files import CALIBRATION_IMAGES
from biper_engine.bench.rivals.onnx_runtime import REST_MS, OnnxRuntimeNetwork, OnnxRuntimeSessions
from biper_engine.bench.rivals.open_vino import OpenVinoNetwork, OpenVinoStreams, has_bf16
from biper_engine.bench.rivals.pytorch import eager_twin_rival
from biper_engine.bench.rivals.recipe import FloatNetworks, Network, OnnxFiles, Recipe, rival_of
from biper_engine.bench.rivals.rival import Rival
from biper_engine.engine import Engine
from biper_engine.export.openvino_graph import binary_model

__all__ = ["deployed_rivals", "openvino_float_rivals", "stream_rivals"]

_ONNX = ("onnx", "onnxscript")
_BINARY = "the engine's graph on BinaryConvolution (opset1, xnor-popcount)"

# A recipe that only lacks the function that loads its model or file.
_Loaded = Callable[[Callable[[Any], Network]], Recipe]


def deployed_rivals(
    engine: Engine, networks: FloatNetworks, images: Tensor, threads: int
) -> list[Rival]:
    """Return every runtime with every precision, checked if it must agree; none is timed.

    These are the float twin in eager PyTorch, on OpenVINO in float32, bfloat16 and int8, and on
    ONNX Runtime in float32 and int8; and the engine's own graph on OpenVINO's BinaryConvolution,
    with the other operators in float32 or bfloat16.

    Args:
        engine: takes and returns one tensor.
        networks: of the same layers as the engine.
        images: the batch; runtimes compile for its shape.
        threads: of each.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = OnnxFiles(Path(folder), networks.twin, images)
        recipes = [*_openvino(files, threads), *_openvino_binary(engine, images, threads)]
        recipes += _onnx_runtime(files, threads)
        made = [rival_of(recipe, images) for recipe in recipes]
    return [eager_twin_rival(networks.twin, images), *made]


def openvino_float_rivals(
    network: fx.GraphModule, model: nn.Module, images: Tensor, threads: int
) -> list[Rival]:
    """Return a float network on OpenVINO: float32, checked, bfloat16, int8; none is timed.

    Args:
        network: the model with its constants folded (`folded_network`).
        model: the network in PyTorch, in eval mode, which float32 must agree with.
        images: the batch; OpenVINO compiles for its shape.
        threads: of each.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipes = _openvino(OnnxFiles(Path(folder), network, images), threads)
        return [
            rival_of(replace(recipe, wanted=model, beside="PyTorch"), images) for recipe in recipes
        ]


def stream_rivals(
    engine: Engine, networks: FloatNetworks, images: Tensor, threads: int
) -> dict[str, list[Rival]]:
    """Return the fastest runtimes, working on several batches at once, each in several ways.

    By program: OpenVINO int8 and OpenVINO binary f32 with one stream, one per two threads, one per
    thread and two per thread; ONNX Runtime int8 with one session of one thread per thread. `bind`
    returns a `Streams`.

    Args:
        engine: takes and returns one tensor.
        networks: of the same layers as the engine.
        images: the batch of one call.
        threads: of each rival, all streams together.
    """

    def with_streams(recipe: _Loaded, count: int) -> Rival:
        made = recipe(lambda model: OpenVinoStreams(model, threads, count))
        how = f"{made.how}; THROUGHPUT hint"
        return rival_of(replace(made, name=_counted(made.name, count, "stream"), how=how), images)

    def with_sessions(recipe: _Loaded) -> Rival:
        made = recipe(lambda path: OnnxRuntimeSessions(path, threads))
        how = f"{made.how}; a session of one thread for each caller"
        return rival_of(
            replace(made, name=_counted(made.name, threads, "session"), how=how), images
        )

    counts = sorted({1, max(1, threads // 2), threads, 2 * threads})
    with tempfile.TemporaryDirectory() as folder:
        files = OnnxFiles(Path(folder), networks.twin, images)
        int8, binary = partial(_openvino_int8, files), partial(_binary_f32, engine, images)
        return {
            "OpenVINO int8": [with_streams(int8, count) for count in counts],
            "OpenVINO binary f32": [with_streams(binary, count) for count in counts],
            "ONNX Runtime int8": [with_sessions(partial(_onnx_runtime_int8, files))],
        }


def _counted(name: str, count: int, what: str) -> str:
    return f"{name}, {count} {what}{'s' * (count != 1)}"


def _onnx_runtime(files: OnnxFiles, threads: int) -> list[Recipe]:
    def load(path: Path) -> OnnxRuntimeNetwork:
        return OnnxRuntimeNetwork(path, threads)

    return [
        Recipe(
            name="ONNX Runtime f32",
            how="the float twin in float32",
            modules=(*_ONNX, "onnxruntime"),
            make=lambda: load(files.float32),
            wanted=files.outputs,
            share=1.0,
            rest_ms=REST_MS,
        ),
        replace(_onnx_runtime_int8(files, load), rest_ms=REST_MS),
    ]


def _onnx_runtime_int8(files: OnnxFiles, load: Callable[[Path], Network]) -> Recipe:
    return Recipe(
        name="ONNX Runtime int8",
        how=(
            "the float twin, quantized (QDQ): uint8 activations, int8 weights with a scale per "
            f"channel, ranges of {CALIBRATION_IMAGES} random images"
        ),
        modules=(*_ONNX, "onnxruntime"),
        make=lambda: load(files.int8),
        wanted=files.outputs,
    )


def _openvino_float(files: OnnxFiles, threads: int) -> list[Recipe]:
    modules = (*_ONNX, "openvino")
    return [
        Recipe(
            name="OpenVINO f32",
            how="the float twin in float32, LATENCY hint, one stream",
            modules=modules,
            make=lambda: OpenVinoNetwork(files.float32, threads, "f32"),
            wanted=files.outputs,
            share=1.0,
        ),
        Recipe(
            name="OpenVINO bf16",
            how="the float twin in bfloat16",
            modules=modules,
            make=lambda: _in_bf16(files.float32, threads),
            wanted=files.outputs,
        ),
    ]


def _openvino(files: OnnxFiles, threads: int) -> list[Recipe]:
    return [
        *_openvino_float(files, threads),
        _openvino_int8(files, lambda path: OpenVinoNetwork(path, threads, "f32")),
    ]


def _openvino_int8(files: OnnxFiles, load: Callable[[Path], Network]) -> Recipe:
    return Recipe(
        name="OpenVINO int8",
        how="the file that ONNX Runtime int8 runs, float32 where it is not quantized",
        modules=(*_ONNX, "openvino", "onnxruntime"),
        make=lambda: load(files.int8),
        wanted=files.outputs,
    )


def _openvino_binary(engine: Engine, images: Tensor, threads: int) -> list[Recipe]:
    in_f32 = _binary_f32(engine, images, lambda model: OpenVinoNetwork(model, threads, "f32"))
    in_bf16 = _binary_f32(engine, images, lambda model: _in_bf16(model, threads))
    how = f"{_BINARY}, bfloat16 otherwise"
    return [in_f32, replace(in_bf16, name="OpenVINO binary bf16", how=how, share=None)]


def _binary_f32(engine: Engine, images: Tensor, load: Callable[[Any], Network]) -> Recipe:
    return Recipe(
        name="OpenVINO binary f32",
        how=f"{_BINARY}, float32 otherwise",
        modules=("openvino",),
        make=lambda: load(binary_model(engine.graph_module, tuple(images.shape))),
        wanted=engine,
        beside="the engine",
        share=0.5,
    )


def _in_bf16(model: Any, threads: int) -> OpenVinoNetwork:
    if not has_bf16():
        raise RuntimeError("OpenVINO does not compute in bfloat16 on this processor")
    return OpenVinoNetwork(model, threads, "bf16")
