"""Read untrusted `torch.save` files and the official `config.txt`, with errors that explain."""

from __future__ import annotations

import argparse
import io
import pickle
import re
import stat
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from biper_engine.errors import CheckpointError
from biper_engine.models.pickles import MOST_PICKLE_BYTES, RefusedError, Survey, survey

__all__ = ["CONFIG_NAME", "ConfigTxt", "read_config_txt", "read_torch_file", "require_file"]

CONFIG_NAME = "config.txt"
"""The file that the official training script writes its options to, beside its checkpoints."""

# What torch.load's zip reader and its pickle interpreter raise for damaged bytes.
_DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
)

_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_CONFIG_BYTES = 1_000_000
_BIPER = b'{"__metadata__":{"biper":'  # follows the length of the header
# First bytes of files that are mistaken for checkpoints, what they are, and what to do.
_FOREIGN = (
    (b"\x08", "perhaps an ONNX model", "Convert the PyTorch model that it was made from."),
    (b"\x89HDF", "an HDF5 file, perhaps of Keras", "Write its weights with torch.save."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (b"BZh", "a bzip2 archive", "Unpack it first."),
    (b"\xfd7zXZ", "an xz archive", "Unpack it first."),
    (b"\x93NUMPY", "a NumPy array", "Write a state dict of tensors with torch.save."),
    (b"GGUF", "a GGUF file", "Pass the checkpoint that it was made from."),
    (b"version https://git-lfs", "a pointer of Git LFS", "Run: git lfs pull"),
    (b"<!DOCTYPE", "a web page", "Download the file itself."),
    (b"<!doctype", "a web page", "Download the file itself."),
    (b"<html", "a web page", "Download the file itself."),
)


def read_torch_file(path: str) -> dict[Any, Any]:
    """Return the dict in a file written by `torch.save`, tensors on the CPU.

    Before anything is read, the declared sizes are compared with the size of the file: no entry may
    be compressed, and no tensor may be larger than the file.

    Raises:
        CheckpointError: missing, truncated, not a `torch.save` file, not a dict, or with objects
            other than tensors and plain values.
    """
    size = _check_container(path)
    try:
        surveyed = _survey_zip(path, size) if zipfile.is_zipfile(path) else _survey_old(path, size)
    except CheckpointError:  # a ValueError; any other ValueError means damage
        raise
    except (RefusedError, RecursionError) as error:
        raise CheckpointError(
            f"'{path}' is not read, because it would make {error}: no checkpoint does. "
            "Do not use the file unless you know who wrote it."
        ) from error
    except (pickle.UnpicklingError, *_DAMAGE) as error:
        raise _damaged(path, error) from error
    _check_kinds(path, surveyed)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_DAMAGE) as error:
        raise _damaged(path, error) from error
    if not isinstance(contents, dict):
        raise CheckpointError(
            f"'{path}' holds a {type(contents).__name__}, wanted a dict: a state dict, or one with "
            "a state dict in it."
        )
    return contents


def require_file(path: str) -> int:
    """Return the size of a regular file.

    Raises:
        CheckpointError: the file is missing or not regular, such as a pipe, which has no end.
    """
    try:
        found = Path(path).stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"Cannot read checkpoint '{path}': {reason}.") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise CheckpointError(
            f"Cannot read checkpoint '{path}': it is {kind}. Pass the path of a file."
        )
    return found.st_size


def _damaged(path: str, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(f"'{path}' is damaged: {reason}. Copy or download it again.")


def _check_container(path: str) -> int:
    """Tell missing, empty, truncated and foreign files apart, and return the size."""
    size = require_file(path)
    try:
        with Path(path).open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"Cannot read checkpoint '{path}': {error.strerror}.") from error
    if size == 0:
        raise CheckpointError(f"'{path}' is empty (0 bytes). Copy or download it again.")
    for start, kind, advice in _FOREIGN:
        if head.startswith(start):
            raise CheckpointError(f"'{path}' is {kind}, wanted a PyTorch checkpoint. {advice}")
    if head[8:].startswith(_BIPER):
        raise CheckpointError(
            f"'{path}' is a .biper file under another name, wanted a checkpoint. It is converted "
            "already: name it *.biper, or load it with biper_engine.load."
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        raise CheckpointError(
            f"'{path}' is a safetensors file, wanted one of torch.save. Name it *.safetensors and "
            "pass it by --weights, or load it with safetensors.torch.load_file."
        )
    if head[:4] == b"PK\x03\x04":
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"'{path}' is truncated: its {size:,} bytes begin as a PyTorch file but lack the "
                "directory at the end. Copy or download it again."
            )
    elif head[:1] != b"\x80":  # first byte of a pickle, the container before PyTorch 1.6
        raise CheckpointError(
            f"'{path}' is not a PyTorch checkpoint: it begins with {head[:4]!r}. Wanted a file "
            "written by torch.save or biper_engine.models.save_checkpoint."
        )
    return size


def _survey_zip(path: str, size: int) -> Survey:
    """Check a zip archive's directory, and the pickle in it, against the file's size."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, *_DAMAGE) as error:
        raise _damaged(path, error) from error
    with archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        packed = [
            name for name, entry in entries.items() if entry.compress_type or entry.flag_bits & 1
        ]
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        _check_archive(path, list(entries), pickles)
        if packed:
            raise CheckpointError(
                f"'{path}' is compressed (entry '{packed[0]}'). torch.save never compresses, and "
                "it is not inflated, since it may grow without bounds. If you trust it: "
                f"torch.save(torch.load('{path}'), 'plain.pt')"
            )
        if len({name.lower() for name in entries}) < len(archive.infolist()):
            raise RefusedError("two entries of one name")  # torch may read either of them
        if sum(entry.file_size for entry in archive.infolist()) > size:
            raise RefusedError("more than its own size")
        if entries[pickles[0]].file_size > MOST_PICKLE_BYTES:
            raise RefusedError(f"{entries[pickles[0]].file_size:,} bytes beside its tensors")
        try:
            contents = archive.read(pickles[0])
        except zipfile.BadZipFile as error:
            raise _damaged(path, error) from error
    found, _ = survey(io.BytesIO(contents))
    folder = pickles[0].removesuffix("data.pkl")
    for key, needed in found.storages.items():
        entry = entries.get(f"{folder}data/{key}")
        if entry is None or needed > entry.file_size:
            there = "none" if entry is None else f"{entry.file_size:,}"
            raise ValueError(
                f"a tensor needs {needed:,} bytes of entry 'data/{key}', which has {there}"
            )
    _check_largest(found, size)
    return found


def _check_archive(path: str, names: list[str], pickles: list[str]) -> None:
    """Refuse archives that torch.save did not write."""
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        raise CheckpointError(
            f"'{path}' is a TorchScript archive, which holds compiled code, wanted a checkpoint. "
            f"Save its weights: torch.save(torch.jit.load('{path}').state_dict(), 'weights.pt')"
        )
    if "archive_format" in inner or "serialized_exported_program.json" in names:
        raise CheckpointError(
            f"'{path}' is an exported program, wanted a checkpoint. In Python, pass "
            f"torch.export.load('{path}') to biper_engine.convert."
        )
    if len(pickles) != 1:
        listing = ", ".join(f"'{name}'" for name in names[:3])
        raise CheckpointError(
            f"'{path}' is a zip archive, but not one of torch.save: it has {listing or 'nothing'}. "
            "If a checkpoint is in it, unpack it first."
        )


def _survey_old(path: str, size: int) -> Survey:
    """Check a file of PyTorch before 1.6 against its size: five pickles, then the storages."""
    with Path(path).open("rb") as file:
        try:
            _, magic = survey(file)
        except (KeyError, IndexError):  # opcodes, or an order of them, that torch.save never uses
            magic = None
        if magic != _OLD_MAGIC:
            raise CheckpointError(
                f"'{path}' is a pickle that torch.save did not write. Load it where it was made, "
                "and write its state dict with torch.save."
            )
        for _ in range(2):  # the protocol's version, sizes of the system
            survey(file)
        found, _ = survey(file)
    if sum(found.storages.values()) > size:
        raise RefusedError("more than its own size")
    _check_largest(found, size)
    return found


def _check_largest(found: Survey, size: int) -> None:
    if found.largest_tensor_bytes > size:
        raise RefusedError(
            f"a tensor of {found.largest_tensor_bytes:,} bytes of a file of {size:,} bytes"
        )


def _check_kinds(path: str, found: Survey) -> None:
    """Refuse objects that only code can make."""
    if found.foreign is None:
        return
    part = "" if found.top is None else ".state_dict()"
    entry = "['state_dict']" if found.top is None else ""
    raise CheckpointError(
        f"'{path}' holds more than tensors and plain values: {found.foreign}. It is not unpickled, "
        "because that can run any code. If you trust the file, save only its weights: "
        f"torch.save(torch.load('{path}', weights_only=False){entry}{part}, 'weights.pt')"
    )


@dataclass(frozen=True, kw_only=True)
class ConfigTxt:
    """The three lines of the official `config.txt` that matter; None if a line is missing."""

    path: Path
    model: str | None
    frequency: float | None
    stage: int | None


def read_config_txt(path: Path) -> ConfigTxt | None:
    """Read `model:`, `freq:` and `stage2:` from the official script's `config.txt`, if it exists.

    Raises:
        CheckpointError: one of the lines has an invalid value.
    """
    if not path.is_file():
        return None
    if path.stat().st_size > _MOST_CONFIG_BYTES:
        raise CheckpointError(
            f"'{path}' is not from the official script: it has {path.stat().st_size:,} bytes. "
            "Put the config.txt of the checkpoint's training there, or remove it."
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    frequency, stage2 = _line(text, "freq"), _line(text, "stage2")
    if stage2 not in (None, "True", "False"):
        raise CheckpointError(f"'{path}' says 'stage2: {stage2}', wanted True or False.")
    try:
        number = None if frequency is None else float(frequency)
    except ValueError as error:
        raise CheckpointError(f"'{path}' says 'freq: {frequency}', wanted a number.") from error
    stage = None if stage2 is None else 2 if stage2 == "True" else 1
    return ConfigTxt(path=path, model=_line(text, "model"), frequency=number, stage=stage)


def _line(text: str, key: str) -> str | None:
    match = re.search(rf"^{key}:[ \t]*(\S+)[ \t]*$", text, flags=re.MULTILINE)
    return match.group(1) if match else None
