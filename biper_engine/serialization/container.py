"""The outer form of a `.biper` file: safetensors with one JSON header, a checksum, atomic writes.

A file has the layout of safetensors: eight bytes of header length, a JSON header with names, types
and offsets, and the tensors' bytes. The key `biper` of its `__metadata__` holds our header in
canonical JSON: keys sorted, no spaces, ASCII, no NaN. The entry `sha256` is the SHA-256 of the
whole file with its own 64 digits written as zeros, so that it covers every other byte.

The header is read and checked first. Its sizes are compared with the size of the file before memory
is allocated for any tensor.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save as _to_safetensors
from torch import Tensor

from biper_engine.errors import FileFormatError
from biper_engine.files import write_atomically
from biper_engine.serialization.json_text import canonical_json, parse
from biper_engine.serialization.regular_file import RegularFile
from biper_engine.serialization.tensor_table import DTYPES, tensor_table

__all__ = ["FORMAT", "read", "write"]

FORMAT = 0

_LENGTH_BYTES = 8
_NO_SUM = "0" * 64
# Our header is a JSON string inside JSON, hence the escaped quotes.
_SUM = re.compile(rb'\\"sha256\\":\\"([0-9a-f]{64})\\"')
_MAX_HEADER_BYTES = 100_000_000  # as in safetensors

_FOREIGN = (
    (b"PK\x03\x04", "a torch checkpoint (a zip archive)", "run `biper convert` on it"),
    (b"\x80", "a pickle, probably an old torch checkpoint", "run `biper convert` on it"),
    (b"\x89HDF", "an HDF5 file", "export it to a torch checkpoint first"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"GGUF", "a GGUF file", "biper_engine cannot read those"),
    (b"\x08", "perhaps an ONNX model", "convert the PyTorch model instead"),
)


def write(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a file atomically: `path` never contains an incomplete file.

    Args:
        path: a new file, or one to replace; a symbolic link is followed.
        header: JSON values, without `format` and `sha256`.
        tensors: tensors by name, on any device; they are copied.

    Raises:
        FileFormatError: the header is not JSON, or files cannot hold a tensor's dtype.
        OSError: the file cannot be written; an existing file does not change.
    """
    text = canonical_json({**header, "format": FORMAT, "sha256": _NO_SUM})
    blob = _to_safetensors(_plain(tensors), {"biper": text})
    header_end = _LENGTH_BYTES + int.from_bytes(blob[:_LENGTH_BYTES], "little")
    matches = list(_SUM.finditer(blob, 0, header_end))
    if len(matches) != 1:
        raise FileFormatError("The engine cannot be saved: `sha256` occurs twice in its header.")
    start, end = matches[0].span(1)
    digest = hashlib.sha256(blob).hexdigest().encode()
    sealed = blob[:start] + digest + blob[end:]
    write_atomically(path, lambda file: file.write(sealed))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to their own contiguous CPU memory, as safetensors requires."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise FileFormatError(
                f"The engine cannot be saved: tensor {name!r} is {tensor.dtype}; files hold "
                f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES.values())}."
            )
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file and check it as a container: kind, length, version and checksum.

    Returns:
        Our header and the tensors, on the CPU, each in its own memory.

    Raises:
        FileFormatError: the message says what was found, what was expected and what to do.
        OSError: there is no such file, or it cannot be read.
    """
    with RegularFile(path) as file:
        start = _start(file)
        outer = _outer_header(file, start)
        header = _our_header(file.name, outer)
        _check_format(file.name, header)
        table = tensor_table(file.name, outer, len(start), file.size)
        digest = _digest_without_sum(file.name, start, header)
        tensors = {entry.name: entry.read(file, digest) for entry in table}
        if digest.hexdigest() != header["sha256"]:
            raise _wrong_sum(file.name)
    return header, tensors


def _start(file: RegularFile) -> bytes:
    """Return the file up to the end of its header."""
    length = file.read(_LENGTH_BYTES + 1)
    if len(length) <= _LENGTH_BYTES:
        raise FileFormatError(
            f"{file.name} is {file.size} bytes, too short for any .biper file; copy or save it "
            "again."
        )
    end = _LENGTH_BYTES + int.from_bytes(length[:_LENGTH_BYTES], "little")
    if length[_LENGTH_BYTES:] != b"{" or not len(length) <= end <= _MAX_HEADER_BYTES:
        raise _foreign(file.name, length)
    if end > file.size:
        raise FileFormatError(
            f"{file.name} is truncated: file is {file.size:,} bytes, its header alone needs "
            f"{end:,}; copy or download it again."
        )
    return length + file.read(end - len(length))


def _outer_header(file: RegularFile, start: bytes) -> dict[str, Any]:
    outer = parse(file.name, start[_LENGTH_BYTES:])
    if not isinstance(outer, dict):
        raise _foreign(file.name, start)
    return outer


def _foreign(name: str, start: bytes) -> FileFormatError:
    kind, advice = "of an unknown kind", "pass a file that `engine.save` wrote"
    for magic, looks_like, action in _FOREIGN:
        if start.startswith(magic):
            kind, advice = looks_like, action
            break
    return FileFormatError(f"{name} is not a .biper file: this is {kind}; {advice}.")


def _our_header(name: str, outer: Mapping[str, Any]) -> dict[str, Any]:
    metadata = outer.get("__metadata__")
    text = metadata.get("biper") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise FileFormatError(
            f"{name} is not a .biper file: this is a safetensors file without the header `biper`, "
            "probably plain weights; convert the model that they belong to."
        )
    header = parse(name, text)
    if not isinstance(header, dict):
        raise FileFormatError(f"{name} is damaged: its header `biper` is not a JSON object.")
    return header


def _check_format(name: str, header: Mapping[str, Any]) -> None:
    version = header.get("format")
    if type(version) is not int:
        raise FileFormatError(
            f"{name} is damaged: its format version is {version!r:.100}, not an integer."
        )
    if version > FORMAT:
        raise FileFormatError(
            f"{name} has format {version!r:.100}, but this version of biper_engine reads up to "
            f"{FORMAT}; upgrade with `pip install -U biper-engine`."
        )
    if version < 0:
        raise FileFormatError(f"{name} has format {version!r:.100}; there is none below 0.")


def _digest_without_sum(name: str, start: bytes, header: Mapping[str, Any]) -> Any:
    """Return the SHA-256 of the file up to the end of its header, with its own digits as zeros."""
    matches = list(_SUM.finditer(start))
    if len(matches) != 1 or matches[0].group(1).decode() != header.get("sha256"):
        raise _wrong_sum(name)
    first, end = matches[0].span(1)
    digest = hashlib.sha256(start[:first])
    digest.update(_NO_SUM.encode())
    digest.update(start[end:])
    return digest


def _wrong_sum(name: str) -> FileFormatError:
    return FileFormatError(
        f"{name} was edited or damaged: its SHA-256 is not the one in its header; copy it again, "
        "or save it again from the engine."
    )
