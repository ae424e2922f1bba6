"""The native program in a file, for loaders that do not compile graphs; Python makes its own.

Beside it stands its seal: the SHA-256 of the texts of `graph`, `signature` and `program`, each with
a line feed behind it, and of every tensor but those of the proof, in the order of their names:
name, dtype, sizes with commas, each with a zero byte behind it, and the bytes. It says that
program, graph and weights were saved together. A part that was copied from another file does not
fit it, whatever the file's own checksum says. It is no signature: who edits a file can compute it.

Programs of version 1 have no seal. Python reads such files, since it does not use the program.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.converted import ProgramSection
from biper_engine.errors import FileFormatError
from biper_engine.graph.signature import Signature
from biper_engine.serialization import container
from biper_engine.serialization.graph_decoding import decode
from biper_engine.serialization.header import header_values
from biper_engine.serialization.json_text import canonical_json
from biper_engine.serialization.tensor_table import DTYPES

__all__ = [
    "PREFIX",
    "SEAL",
    "MakeProgram",
    "add_program",
    "check_program",
    "check_seal",
    "plain_tensors",
    "seal_of",
    "take_program",
]

MakeProgram = Callable[[fx.GraphModule, Signature, Mapping[str, Tensor], str], ProgramSection]
"""Returns the program of a graph with constants; the names of its other tensors have a prefix."""

PREFIX = "program/"

SEAL = "program_seal"
_SEALED = 2  # the first version with a seal
_SEALED_ENTRIES = ("graph", "signature", "program")
_UNSEALED = b"proof/"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_SMALL = 8  # a program's own tensors are small up to this part of the others
_SMALL_BYTES = 1 << 16


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, each as a file holds it: contiguous, in its own memory."""
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def add_program(
    entries: dict[str, Any],
    tensors: dict[str, Tensor],
    section: ProgramSection,
    *,
    any_size: bool,
) -> None:
    """Add a program to the entries and tensors of a file.

    Args:
        entries: of the header.
        tensors: of the graph, by name.
        section: the program; one whose tensors are not small is left out, with that reason.
        any_size: whether to add such a one, too.
    """
    own, others = (sum(x.nbytes for x in some.values()) for some in (section.tensors, tensors))
    if own > max(_SMALL_BYTES, others // _SMALL) and not any_size:
        reason = f"its tensors would add {own:,} bytes; `engine.save(path, program=True)` adds them"
        entries["program"] = {"version": section.entry["version"], "reason": reason}
        return
    entries["program"] = section.entry
    tensors.update(section.tensors)
    entries[SEAL] = seal_of(entries, tensors)


def seal_of(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the seal of a file's program in 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in _SEALED_ENTRIES:
        digest.update(f"{canonical_json(header.get(name))}\n".encode())
    named = {name.encode("utf-8", "surrogatepass"): tensor for name, tensor in tensors.items()}
    for key, tensor in sorted(named.items()):
        if not key.startswith(_UNSEALED):
            sizes = ",".join(map(str, tensor.shape))
            digest.update(key + f"\0{_DTYPE_NAMES[tensor.dtype]}\0{sizes}\0".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    values: Any = tensor.detach().contiguous().reshape(-1)
    return memoryview(values.view(torch.uint8).numpy()) if values.numel() else memoryview(b"")


def take_program(header: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the tensors of a program, of whichever version it is, and return them.

    Raises:
        FileFormatError: the header's entry is no program.
    """
    entry = header.get("program", {"version": 0})
    if not isinstance(entry, dict) or type(entry.get("version")) is not int:
        raise FileFormatError(
            f"The file's header has a wrong entry `program`: {entry!r:.100}; the file was edited."
        )
    own = [name for name in tensors if name.startswith(PREFIX) and "program" in header]
    return {name: tensors.pop(name) for name in own}


def check_seal(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Check that a program, if it has a seal, belongs to the graph and the tensors of its file.

    Args:
        header: of the file, with a graph that can be read.
        tensors: of graph and program.

    Raises:
        FileFormatError: it does not.
    """
    entry = header.get("program", {})
    if entry.get("version") != _SEALED or "steps" not in entry:
        return
    if header.get(SEAL) != seal_of(header, tensors):
        raise FileFormatError(
            "The file's native program was not saved together with its graph and weights: a part "
            "comes from another file, or was edited. Save the network again, or copy the file."
        )


def check_program(path: str | os.PathLike[str], make_program: MakeProgram) -> bool | None:
    """Tell whether the program in a file is the one that its graph gives, bit for bit.

    Args:
        path: a file that `read` reads.
        make_program: makes the program of the graph.

    Returns:
        None for a file without a program, or with one of another version.

    Raises:
        FileFormatError, OSError: as `read`.
    """
    header, tensors = container.read(path)
    entry = header.get("program", {})
    if "steps" not in entry:
        return None
    own = take_program(header, tensors)
    graph = {node["tensor"] for node in header["graph"] if "tensor" in node}
    constants = {name: tensor for name, tensor in tensors.items() if name in graph}
    signature = header_values(header)["signature"]
    module = decode(header["graph"], constants, signature.inputs)
    wanted = make_program(module, signature, constants, PREFIX)
    if entry["version"] != wanted.entry["version"]:
        return None
    # Texts and bytes, since 0.0 == -0.0.
    same = own.keys() == wanted.tensors.keys() and canonical_json(entry) == canonical_json(
        wanted.entry
    )
    return same and all(
        (own[name].dtype, own[name].shape) == (tensor.dtype, tensor.shape)
        and _bytes(own[name]) == _bytes(tensor)
        for name, tensor in wanted.tensors.items()
    )
