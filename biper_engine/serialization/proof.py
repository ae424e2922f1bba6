"""Proofs: what a network computes, recorded when it is saved, so that any backend can repeat it.

A proof is a seed, and the SHA-256 of every packed map and of the outputs for the input made from
the seed, computed by the reference backend. `replay` repeats it on any backend.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.bits import count_different
from biper_engine.converted import BYTES, ConvertedNetwork, Proof
from biper_engine.errors import FileFormatError
from biper_engine.graph.reading import interpret, packed_map
from biper_engine.graph.signature import InputSpec
from biper_engine.ops.backends import forced_name
from biper_engine.serialization.execution import call_node, digest, exactly, forced
from biper_engine.serialization.reports import ProofReport

__all__ = [
    "BATCH",
    "example_inputs",
    "make_proof",
    "proof_entry",
    "proof_tensors",
    "read_proof",
    "replay",
]

BATCH = 2
_MAX_STORED_VALUES = 65_536
_TENSOR_PREFIX = "proof/output/"

# Outputs may differ from the record by the rounding of float layers, which torch computes in
# another order on another machine: thousands of terms of 2^-24 each, far below one flipped bit.
_OUTPUT_TOLERANCE = 1e-5


def proof_entry(proof: Proof) -> dict[str, Any]:
    """Return the header entry of a proof; `proof_tensors` returns the rest."""
    return {
        "seed": proof.seed,
        "maps": [[name, digest] for name, digest in proof.maps.items()],
        "outputs": list(proof.outputs),
        "values": sorted(proof.values),
        **({} if proof.bound == BYTES else {"bound": proof.bound}),
    }


def proof_tensors(proof: Proof) -> dict[str, Tensor]:
    """Return the stored outputs of a proof by their names in files."""
    return {f"{_TENSOR_PREFIX}{i}": value for i, value in proof.values.items()}


def read_proof(entry: Any, tensors: dict[str, Tensor]) -> Proof:
    """Return the proof of a header entry, and remove its tensors from `tensors`.

    Raises:
        FileFormatError: the entry does not have the form of `proof_entry`.
    """
    try:
        maps, outputs, positions = entry["maps"], entry["outputs"], entry["values"]
        _require(type(entry["seed"]) is int and 0 <= entry["seed"] < 1 << 63, "a seed")
        _require(all(type(part) is list for part in (maps, outputs, positions)), "lists")
        _require(all(map(_is_record, maps)), "maps by name")
        _require(all(o is None or _is_digest(o) for o in outputs), "hashes of outputs")
        whole = all(type(i) is int and 0 <= i < len(outputs) for i in positions)
        _require(whole and positions == sorted(set(positions)), "positions of outputs")
        bound = entry.get("bound", BYTES)
        _require(type(bound) is int and 1 <= bound <= BYTES, "a bound of integers")
        values = {i: tensors.pop(f"{_TENSOR_PREFIX}{i}") for i in positions}
        _require(all(outputs[i] is not None for i in positions), "hashes of stored outputs")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"The file's header has a wrong proof: {error!r:.200}.") from error
    named = {name: digest for name, digest in maps}  # noqa: C416  (a dict of lists)
    if len(named) != len(maps):
        raise FileFormatError("The file's header has a wrong proof: a map occurs twice.")
    return Proof(entry["seed"], named, tuple(outputs), values, bound)


_DIGEST = re.compile("[0-9a-f]{64}")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"it lacks {what}")


def _is_digest(value: Any) -> bool:
    return type(value) is str and _DIGEST.fullmatch(value) is not None


def _is_record(value: Any) -> bool:
    return (
        type(value) is list
        and len(value) == 2
        and type(value[0]) is str
        and len(value[0]) <= 1000
        and _is_digest(value[1])
    )


def example_inputs(inputs: Sequence[InputSpec], seed: int, bound: int = BYTES) -> list[Tensor]:
    """Make a network's inputs from a seed, the same on every machine and in every version.

    The bytes are those of SHAKE-256 of "seed:name"; a float is `byte / 127.5 - 1`, computed in
    float32, an integer the byte modulo `bound`, a bool its lowest bit. The batch is 2.
    """
    return [_example_input(spec, seed, bound) for spec in inputs]


def _example_input(spec: InputSpec, seed: int, bound: int) -> Tensor:
    shape = tuple(BATCH if size is None else size for size in spec.shape)
    count = int(torch.Size(shape).numel())
    stream = bytearray(hashlib.shake_256(f"{seed}:{spec.name}".encode()).digest(count))
    data = (
        torch.frombuffer(stream, dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
    )
    data = data.reshape(shape)
    if spec.dtype == torch.bool:
        return (data & 1).bool()
    return (
        (data.float() / 127.5 - 1).to(spec.dtype)
        if spec.dtype.is_floating_point
        else (data % bound if bound < BYTES else data).to(spec.dtype)
    )


def make_proof(module: fx.GraphModule, inputs: Sequence[InputSpec], seed: int) -> Proof:
    """Run a network on the reference backend and record what it computes.

    Integers may be positions in a table, such as tokens of an embedding: they are bytes if the
    network takes them, or smaller.
    """
    bound = BYTES
    while True:
        try:
            maps, outputs = _run(module, example_inputs(inputs, seed, bound), "reference")
            break
        except (IndexError, RuntimeError):
            if bound == 1 or not any(_is_integer(spec) for spec in inputs):
                raise
            bound //= 2
    stored = {
        position: value
        for position, value in enumerate(outputs)
        if isinstance(value, Tensor) and value.numel() <= _MAX_STORED_VALUES
    }
    return Proof(
        seed,
        {name: digest(value) for name, value in maps.items()},
        tuple(digest(value) if isinstance(value, Tensor) else None for value in outputs),
        stored,
        bound,
    )


def _is_integer(spec: InputSpec) -> bool:
    return not spec.dtype.is_floating_point and spec.dtype != torch.bool


def _run(
    module: fx.GraphModule, inputs: Sequence[Tensor], backend: str | None
) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """Return the packed maps by node name, and the outputs."""
    maps: dict[str, Tensor] = {}

    def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
        result = call_node(node, args, kwargs, prepack=backend != "reference")
        packed = packed_map(node, result)
        if packed is not None:
            maps[node.name] = packed
        return result

    with forced(backend), exactly():
        return maps, interpret(module, inputs, call)


def replay(
    network: ConvertedNetwork, proof: Proof | None = None, *, backend: str | None = None
) -> ProofReport:
    """Repeat a proof and compare with the record.

    Args:
        network: a network that was read from a file, on any device.
        proof: None means the network's own.
        backend: a name from `biper_engine.backends()`; None takes what an engine would.

    Returns:
        Whether every packed map and output has the recorded bytes; if not, the first map that
        differs, the number of its bits that differ from the reference on this machine, and the
        difference of the outputs.

    Raises:
        ValueError: there is no proof, because the network was not read from a file.
        BackendUnavailableError: `backend` cannot run the network.
    """
    proof = network.proof if proof is None else proof
    if proof is None:
        raise ValueError(
            "This engine has no proof: it was not loaded from a file. Save and load it."
        )
    device = network.device or torch.device("cpu")
    made = example_inputs(network.signature.inputs, proof.seed, proof.bound)
    inputs = [value.to(device) for value in made]
    maps, outputs = _run(network.graph_module, inputs, backend)
    got = {name: digest(value) for name, value in maps.items()}
    digests = tuple(digest(value) if isinstance(value, Tensor) else None for value in outputs)
    report = ProofReport(
        backend=backend or forced_name() or "automatic",
        seed=proof.seed,
        maps=len(proof.maps),
        maps_identical=got == dict(proof.maps),
        outputs_identical=digests == proof.outputs,
        max_output_difference=_output_difference(outputs, proof.values),
        outputs_close=_outputs_close(outputs, proof.values) or digests == proof.outputs,
    )
    first = next((name for name in proof.maps if got.get(name) != proof.maps[name]), None)
    if first is None:
        return report
    return _locate(network.graph_module, inputs, maps, replace(report, node=first), proof)


def _locate(
    module: fx.GraphModule,
    inputs: Sequence[Tensor],
    maps: Mapping[str, Tensor],
    report: ProofReport,
    proof: Proof,
) -> ProofReport:
    """Add the number of bits that differ in the first different map; hashes do not show it."""
    assert report.node is not None
    if report.node not in maps:
        return report
    wanted = _run(module, inputs, "reference")[0][report.node]
    return replace(
        report,
        bits_differ=count_different(maps[report.node], wanted),
        reference_agrees=digest(wanted) == proof.maps[report.node],
    )


def _pairs(outputs: Sequence[Any], values: Mapping[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return (output, recorded) in float64 if there is a record of the same shape."""
    found = [(outputs[i], wanted) for i, wanted in values.items() if i < len(outputs)]
    return [
        (got.cpu().double(), wanted.double())
        for got, wanted in found
        if isinstance(got, Tensor) and got.shape == wanted.shape
    ]


def _output_difference(outputs: Sequence[Any], values: Mapping[int, Tensor]) -> float | None:
    pairs = _pairs(outputs, values)
    differences = [float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs]
    return max(differences) if differences else None


def _outputs_close(outputs: Sequence[Any], values: Mapping[int, Tensor]) -> bool:
    pairs = _pairs(outputs, values)
    return len(pairs) == len(outputs) and all(
        not a.numel() or bool((a - b).abs().max() <= _OUTPUT_TOLERANCE * b.abs().max())
        for a, b in pairs
    )
