"""`.biper` files: one converted network in one safetensors file, with a proof of what it computes.

The header entry `biper` has `format`, `graph`, `signature`, `report`, `metadata`, `provenance`,
`options`, `proof`, `sha256`, and for loaders without Python `program` and `program_seal`. Nothing
is pickled; every name, shape and value is checked when a file is read. The format is 0, and may
change, until release 1.0.
"""

from __future__ import annotations

import os

import torch

from biper_engine.converted import ConvertedNetwork
from biper_engine.errors import FileFormatError
from biper_engine.graph.reading import output_values
from biper_engine.serialization import container, graph_format
from biper_engine.serialization.backend_check import check_backend
from biper_engine.serialization.graph_decoding import decode
from biper_engine.serialization.header import header_entries, header_values
from biper_engine.serialization.json_text import canonical_json
from biper_engine.serialization.native_program import (
    PREFIX,
    MakeProgram,
    add_program,
    check_program,
    check_seal,
    plain_tensors,
    take_program,
)
from biper_engine.serialization.proof import (
    example_inputs,
    make_proof,
    proof_entry,
    proof_tensors,
    read_proof,
    replay,
)
from biper_engine.serialization.reports import BackendReport, NodeReport, ProofReport

__all__ = [
    "BackendReport",
    "NodeReport",
    "ProofReport",
    "check_backend",
    "check_program",
    "example_inputs",
    "read",
    "replay",
    "write",
]

SEED = 0


def write(
    network: ConvertedNetwork,
    path: str | os.PathLike[str],
    *,
    make_program: MakeProgram | None = None,
    any_size: bool = False,
) -> None:
    """Write a network to a `.biper` file, atomically and with a new proof.

    Writing twice gives the same bytes. The network may be on any device; the proof is computed on
    the CPU by the reference backend.

    Args:
        network: what to write.
        path: a new file, or one to replace.
        make_program: makes the network's native program; without it, the file has none.
        any_size: whether the file gets the program also where its tensors are large.

    Raises:
        FileFormatError: the network has an operator, an argument or a form of inputs or outputs
            that files cannot hold; nothing is written.
        OSError: the file cannot be written; an existing file does not change.
    """
    inputs = network.signature.inputs
    nodes, constants = graph_format.encode(network.graph_module)
    entries = {**header_entries(network), "graph": nodes}
    canonical_json(entries)  # fails before the expensive work
    with torch.inference_mode(False):
        tensors = {name: tensor.detach().cpu() for name, tensor in constants.items()}
        proof = make_proof(decode(nodes, tensors, inputs), inputs, SEED)
        entries["proof"] = proof_entry(proof)
        if make_program is not None:
            own = plain_tensors(tensors)
            section = make_program(decode(nodes, own, inputs), network.signature, own, PREFIX)
            add_program(entries, tensors, section, any_size=any_size)
    container.write(path, entries, {**tensors, **proof_tensors(proof)})


def read(path: str | os.PathLike[str]) -> ConvertedNetwork:
    """Read a network from a `.biper` file, on the CPU; its proof is not yet replayed.

    Raises:
        FileFormatError: the file is truncated, edited, foreign or of an unknown version; the
            message says what was found, what was expected and what to do.
        OSError: there is no such file, or it cannot be read.
    """
    header, tensors = container.read(path)
    try:
        return _network(header, tensors)
    except FileFormatError as error:
        raise FileFormatError(f"{os.fspath(path)}: {error}") from error


def _network(header: dict[str, object], tensors: dict[str, torch.Tensor]) -> ConvertedNetwork:
    known = header_values(header)
    signature = known["signature"]
    proof = read_proof(header.get("proof"), tensors)
    program = take_program(header, tensors)
    module = decode(header.get("graph"), tensors, signature.inputs)
    check_seal(header, {**tensors, **program})
    outputs = len(output_values(module.graph))
    if outputs != signature.out_spec.num_leaves or outputs != len(proof.outputs):
        raise FileFormatError(
            f"The graph returns {outputs} values, its signature "
            f"{signature.out_spec.num_leaves}, its proof {len(proof.outputs)}; the file was edited."
        )
    return ConvertedNetwork(module, **known, proof=proof)
