"""`.biper` files: one engine in one safetensors file, with a proof of what it computes.

The header entry `biper` has `format`, `graph`, `signature`, `report`, `metadata`, `provenance`,
`options`, `proof` and `sha256`. Nothing is pickled; every name, shape and value is checked on the
way in. The format is 0, and may change, until release 1.0.
"""

from __future__ import annotations

import os

import torch

from biper_engine.engine import Engine
from biper_engine.errors import FileFormatError
from biper_engine.graph.reading import output_values
from biper_engine.serialization import container, graph_format
from biper_engine.serialization.backend_check import check_backend
from biper_engine.serialization.graph_decoding import decode
from biper_engine.serialization.header import engine_arguments, engine_entries
from biper_engine.serialization.json_text import canonical_json
from biper_engine.serialization.proof import Proof, example_inputs, make_proof, replay
from biper_engine.serialization.reports import BackendReport, NodeReport, ProofReport

__all__ = [
    "BackendReport",
    "NodeReport",
    "Proof",
    "ProofReport",
    "check_backend",
    "example_inputs",
    "load",
    "replay",
    "save",
]

SEED = 0


def save(engine: Engine, path: str | os.PathLike[str]) -> None:
    """Write an engine to a `.biper` file, atomically and with a proof.

    Saving twice gives the same bytes. An engine on any device is saved; the proof is computed on
    the CPU by the reference backend.

    Raises:
        FileFormatError: the engine has an operator, an argument or a form of inputs or outputs that
            files cannot hold; nothing is written.
        OSError: the file cannot be written; an older one stays as it was.
    """
    nodes, constants = graph_format.encode(engine.graph_module)
    entries = {**engine_entries(engine), "graph": nodes}
    canonical_json(entries)  # fails before the work
    with torch.inference_mode(False):
        tensors = {name: tensor.detach().cpu() for name, tensor in constants.items()}
        module = decode(nodes, tensors, engine.signature.inputs)
        proof = make_proof(module, engine.signature.inputs, SEED)
    entries["proof"] = proof.to_dict()
    container.write(path, entries, {**tensors, **proof.tensors()})


def load(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Engine:
    """Read an engine from a `.biper` file; `engine.proof` is the file's proof, not yet replayed.

    Args:
        path: a file that `save` wrote.
        device: where the engine shall be.

    Raises:
        FileFormatError: the file is truncated, edited, foreign or of an unknown version; the
            message says what came, what was wanted and what to do.
        OSError: there is no such file, or it cannot be read.
    """
    with torch.inference_mode(False):
        header, tensors = container.read(path)
        try:
            engine = _engine(header, tensors)
        except FileFormatError as error:
            raise FileFormatError(f"{os.fspath(path)}: {error}") from error
        return engine if torch.device(device).type == "cpu" else engine.to(device)


def _engine(header: dict[str, object], tensors: dict[str, torch.Tensor]) -> Engine:
    arguments = engine_arguments(header)
    signature = arguments["signature"]
    proof = Proof.from_dict(header.get("proof"), tensors)
    module = decode(header.get("graph"), tensors, signature.inputs)
    outputs = len(output_values(module.graph))
    if outputs != signature.out_spec.num_leaves or outputs != len(proof.outputs):
        raise FileFormatError(
            f"The graph returns {outputs} values, its signature "
            f"{signature.out_spec.num_leaves}, its proof {len(proof.outputs)}; the file was edited."
        )
    engine = Engine(module, **arguments)
    engine.proof = proof
    return engine
