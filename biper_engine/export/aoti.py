"""Write packages of AOTInductor, which PyTorch loads without this package's Python."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.converted import ConvertedNetwork
from biper_engine.errors import ExportError
from biper_engine.export.check import Run, compare, example_inputs
from biper_engine.export.flat import Flat, free_batch
from biper_engine.export.report import ExportReport
from biper_engine.files import write_atomically
from biper_engine.graph.reading import biper_op
from biper_engine.ops.epilogue import NUMBERS

__all__ = ["write"]

_LIMITS = {"clamp_min": -math.inf, "clamp_max": math.inf}


def write(network: ConvertedNetwork, path: Path) -> ExportReport:
    """Compile the network ahead of time; its binary layers call the operators of this package."""
    if path.suffix != ".pt2":
        raise ExportError(f"AOTInductor's packages end in .pt2, but `path` is '{path}'.")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, path.name)
        _compile(network, made)
        agreement = compare(network, _runner(made), f"AOTInductor of PyTorch {torch.__version__}")
        data = made.read_bytes()
    write_atomically(path, lambda file: file.write(data))
    return ExportReport(
        path=str(path),
        format="aoti",
        contents="an AOTInductor package",
        file_bytes=len(data),
        agreement=agreement,
        notes=("it is for this processor's instruction set, and calls the operators `biper::`",),
    )


def _compile(network: ConvertedNetwork, path: Path) -> None:
    specs = network.signature.inputs
    with torch.no_grad():
        program = torch.export.export(
            Flat(_finite(network.graph_module)),
            tuple(example_inputs(specs, 2)),
            dynamic_shapes=free_batch([spec.shape[:1] == (None,) for spec in specs]),
        )
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _finite(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return the graph without limits that are infinite: packages cannot hold such numbers.

    They limit nothing, except for a NaN, which is outside of the contract.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    for node in graph.nodes:
        if biper_op(node) is not None:
            limits = {name: node.kwargs.get(name) for name in NUMBERS}
            endless = [name for name, limit in limits.items() if limit in (_LIMITS[name], None)]
            node.kwargs = {k: v for k, v in node.kwargs.items() if k not in endless}
    return fx.GraphModule(graph_module, graph)


def _runner(path: Path) -> Run:
    loaded = torch._inductor.aoti_load_package(str(path))

    def run(inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        result: Any = loaded(*inputs)
        return [result] if isinstance(result, Tensor) else list(result), []

    return run
