"""Read untrusted `torch.save` files and the official `config.txt`, with errors that explain."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from biper_engine.errors import CheckpointError

__all__ = ["CONFIG_NAME", "ConfigTxt", "read_config_txt", "read_torch_file"]

CONFIG_NAME = "config.txt"
"""The file that the official training script writes its options to, beside its checkpoints."""

# What torch.load raises for damaged bytes, by way of its zip reader and its pickle interpreter.
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


def read_torch_file(path: str) -> dict[Any, Any]:
    """Return the dict in a file written by `torch.save`, tensors on the CPU.

    Raises:
        CheckpointError: missing, truncated, not a `torch.save` file, not a dict, or with objects
            other than tensors and plain values.
    """
    _check_container(path)
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"'{path}' holds more than tensors and plain values, or is damaged, and is not "
            f"unpickled for safety: {reason} Save only the state dict."
        ) from error
    except _DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"'{path}' is damaged: {reason}. Copy or download it again."
        ) from error
    if not isinstance(contents, dict):
        raise CheckpointError(
            f"'{path}' holds a {type(contents).__name__}, wanted a dict: a state dict, or one with "
            "'state_dict' in it."
        )
    return contents


def _check_container(path: str) -> None:
    """Tell missing, empty, truncated and foreign files apart before torch.load guesses."""
    try:
        size = Path(path).stat().st_size
        with Path(path).open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise CheckpointError(f"Cannot read checkpoint '{path}': {error.strerror}.") from error
    if size == 0:
        raise CheckpointError(f"'{path}' is empty (0 bytes). Copy or download it again.")
    if head == b"PK\x03\x04":
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"'{path}' is truncated: its {size:,} bytes begin as a PyTorch file but lack the "
                "directory at the end. Copy or download it again."
            )
    elif head[:1] != b"\x80":  # first byte of a pickle, the container before PyTorch 1.6
        raise CheckpointError(
            f"'{path}' is not a PyTorch checkpoint: it begins with {head!r}. Wanted a file "
            "written by torch.save or biper_engine.models.save_checkpoint."
        )


@dataclass(frozen=True, kw_only=True)
class ConfigTxt:
    """The three lines of the official `config.txt` that matter; None where a line is absent."""

    path: Path
    model: str | None
    frequency: float | None
    stage: int | None


def read_config_txt(path: Path) -> ConfigTxt | None:
    """Read `model:`, `freq:` and `stage2:` from the official script's `config.txt`, if it exists.

    Raises:
        CheckpointError: one of the lines has a value that is not understood.
    """
    if not path.is_file():
        return None
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
