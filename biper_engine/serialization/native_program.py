"""The native program in a file, for loaders that do not compile graphs; Python makes its own."""

from __future__ import annotations

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

__all__ = [
    "PREFIX",
    "MakeProgram",
    "add_program",
    "check_program",
    "drop_program",
    "plain_tensors",
]

MakeProgram = Callable[[fx.GraphModule, Signature, Mapping[str, Tensor], str], ProgramSection]
"""Returns the program of a graph with constants; the names of its other tensors have a prefix."""

PREFIX = "program/"

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


def drop_program(header: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Remove the tensors of a program, of whichever version it is.

    Raises:
        FileFormatError: the header's entry is no program.
    """
    if "program" not in header:
        return
    entry = header["program"]
    for name in [name for name in tensors if name.startswith(PREFIX)]:
        del tensors[name]
    if not isinstance(entry, dict) or type(entry.get("version")) is not int:
        raise FileFormatError(
            f"The file's header has a wrong entry `program`: {entry!r:.100}; the file was edited."
        )


def check_program(path: str | os.PathLike[str], make_program: MakeProgram) -> bool | None:
    """Tell whether the program in a file is the one that its graph gives, number for number.

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
    own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)}
    graph = {node["tensor"] for node in header["graph"] if "tensor" in node}
    constants = {name: tensor for name, tensor in tensors.items() if name in graph}
    signature = header_values(header)["signature"]
    module = decode(header["graph"], constants, signature.inputs)
    wanted = make_program(module, signature, constants, PREFIX)
    if entry["version"] != wanted.entry["version"]:
        return None
    same = own.keys() == wanted.tensors.keys() and entry == wanted.entry
    return same and all(
        own[name].dtype == tensor.dtype and own[name].equal(tensor)
        for name, tensor in wanted.tensors.items()
    )
