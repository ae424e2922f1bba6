"""The outer form of a `.biper` file: safetensors with one JSON header, a checksum, atomic writes.

A file is what safetensors defines: eight bytes of header length, a JSON header with names, types
and offsets, and the tensors' bytes. The key `biper` of its `__metadata__` holds our header,
canonical JSON: keys sorted, no spaces, ASCII, no NaN. The entry `sha256` is the SHA-256 of the
whole file with the sum's own 64 digits written as zeros, so that it covers every other byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save as _to_safetensors
from torch import Tensor

from biper_engine.errors import FileFormatError
from biper_engine.files import write_atomically

__all__ = ["FORMAT", "read", "write"]

FORMAT = 0

_LENGTH_BYTES = 8
_NO_SUM = "0" * 64
# Our header is a JSON string inside JSON, hence the escaped quotes.
_SUM = re.compile(rb'\\"sha256\\":\\"([0-9a-f]{64})\\"')
_MAX_HEADER_BYTES = 100_000_000  # as in safetensors

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

_FOREIGN = (
    (b"PK\x03\x04", "a torch checkpoint (a zip archive)", "run `biper convert` on it"),
    (b"\x80", "a pickle, probably an old torch checkpoint", "run `biper convert` on it"),
    (b"\x89HDF", "an HDF5 file", "export it to a torch checkpoint first"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"GGUF", "a GGUF file", "biper_engine cannot read those"),
    (b"\x08", "perhaps an ONNX model", "convert the PyTorch model instead"),
)


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value.

    Raises:
        FileFormatError: it holds something that JSON has no form for.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"The engine cannot be saved: its header is not JSON: {error}."
        ) from error


def write(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a file, atomically: at no time is there half a file under `path`.

    Args:
        path: a new file, or one to replace; a symbolic link is followed.
        header: JSON values, without `format` and `sha256`.
        tensors: by name; on any device, copied.

    Raises:
        FileFormatError: the header is not JSON, or a tensor's dtype has no form in files.
        OSError: the file cannot be written; an older one stays as it was.
    """
    text = canonical_json({**header, "format": FORMAT, "sha256": _NO_SUM})
    blob = _to_safetensors(_plain(tensors), {"biper": text})
    matches = list(_SUM.finditer(blob, 0, _header_end(blob)))
    if len(matches) != 1:
        raise FileFormatError("The engine cannot be saved: `sha256` occurs twice in its header.")
    start, end = matches[0].span(1)
    digest = hashlib.sha256(blob).hexdigest().encode()
    sealed = blob[:start] + digest + blob[end:]
    write_atomically(path, lambda file: file.write(sealed))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to contiguous CPU memory of their own, as safetensors wants them."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values():
            raise FileFormatError(
                f"The engine cannot be saved: tensor {name!r} is {tensor.dtype}; files hold "
                f"{', '.join(str(d).removeprefix('torch.') for d in _DTYPES.values())}."
            )
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file and check it as a container: kind, length, version and checksum.

    Returns:
        Our header and the tensors, on the CPU, each in memory of its own.

    Raises:
        FileFormatError: the message says what came, what was wanted and what to do.
        OSError: there is no such file, or it cannot be read.
    """
    blob = Path(path).read_bytes()
    name = os.fspath(path)
    outer = _outer_header(name, blob)
    header = _our_header(name, outer)
    _check_size(name, blob, outer)
    _check_format(name, header)
    _check_sum(name, blob, header)
    return header, _tensors(name, blob)


def _header_end(blob: bytes) -> int:
    return _LENGTH_BYTES + int.from_bytes(blob[:_LENGTH_BYTES], "little")


def _outer_header(name: str, blob: bytes) -> dict[str, Any]:
    if len(blob) <= _LENGTH_BYTES:
        raise FileFormatError(
            f"{name} is {len(blob)} bytes, too short for any .biper file; copy or save it again."
        )
    end = _header_end(blob)
    if blob[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{" or end > _MAX_HEADER_BYTES:
        raise _foreign(name, blob)
    if end > len(blob):
        raise FileFormatError(
            f"{name} is truncated: file is {len(blob):,} bytes, its header alone needs {end:,}; "
            "copy or download it again."
        )
    outer = _parse(name, blob[_LENGTH_BYTES:end])
    if not isinstance(outer, dict):
        raise _foreign(name, blob)
    return outer


def _parse(name: str, text: bytes | str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{name} is damaged: its header is not JSON ({error}); copy or save it again."
        ) from error


def _foreign(name: str, blob: bytes) -> FileFormatError:
    kind, advice = "of an unknown kind", "pass a file that `engine.save` wrote"
    for magic, looks_like, action in _FOREIGN:
        if blob.startswith(magic):
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
    header = _parse(name, text)
    if not isinstance(header, dict):
        raise FileFormatError(f"{name} is damaged: its header `biper` is no JSON object.")
    return header


def _check_size(name: str, blob: bytes, outer: Mapping[str, Any]) -> None:
    try:
        ends = [
            int(entry["data_offsets"][1]) for key, entry in outer.items() if key != "__metadata__"
        ]
    except (TypeError, KeyError, IndexError, ValueError, OverflowError) as error:
        raise FileFormatError(
            f"{name} is damaged: its table of tensors is unreadable; copy or save it again."
        ) from error
    promised = _header_end(blob) + max(ends, default=0)
    if len(blob) < promised:
        raise FileFormatError(
            f"{name} is truncated: file is {len(blob):,} bytes, header promises {promised:,}; copy "
            "or download it again."
        )
    if len(blob) > promised:
        raise FileFormatError(
            f"{name} has bytes after its end: file is {len(blob):,} bytes, header promises "
            f"{promised:,}; copy or download it again."
        )


def _check_format(name: str, header: Mapping[str, Any]) -> None:
    version = header.get("format")
    if type(version) is not int:
        raise FileFormatError(f"{name} is damaged: its format version is {version!r}, no integer.")
    if version > FORMAT:
        raise FileFormatError(
            f"{name} has format {version}, but this version of biper_engine reads up to {FORMAT}; "
            "upgrade with `pip install -U biper-engine`."
        )
    if version < 0:
        raise FileFormatError(f"{name} has format {version}; there is none below 0.")


def _check_sum(name: str, blob: bytes, header: Mapping[str, Any]) -> None:
    matches = list(_SUM.finditer(blob, 0, _header_end(blob)))
    if len(matches) == 1:
        start, end = matches[0].span(1)
        digest = hashlib.sha256(blob[:start])
        digest.update(_NO_SUM.encode())
        digest.update(memoryview(blob)[end:])
        if digest.hexdigest() == header.get("sha256"):
            return
    raise FileFormatError(
        f"{name} was edited or damaged: its SHA-256 is not the one in its header; copy it again, "
        "or save it again from the engine."
    )


def _tensors(name: str, blob: bytes) -> dict[str, Tensor]:
    try:
        entries = deserialize(blob)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise FileFormatError(f"{name} is damaged: {error}; copy or save it again.") from error
    return {key: _tensor(name, key, entry) for key, entry in entries}


def _tensor(name: str, key: str, entry: Mapping[str, Any]) -> Tensor:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise FileFormatError(
            f"{name} cannot be read: tensor {key!r} has dtype {entry['dtype']}; known are "
            f"{', '.join(_DTYPES)}."
        )
    data, shape = bytearray(entry["data"]), entry["shape"]
    try:
        if not data:
            return torch.empty(shape, dtype=dtype)
        if dtype == torch.bool:  # any byte may stand in a file, only 0 and 1 in a bool tensor
            return torch.frombuffer(data, dtype=torch.uint8).reshape(shape).ne(0)
        return torch.frombuffer(data, dtype=dtype).reshape(shape)
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{name} is damaged: tensor {key!r} cannot have shape {shape}; save it again."
        ) from error
