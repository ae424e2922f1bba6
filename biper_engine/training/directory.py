"""The directory of a run: who may use it, and what it says about itself."""

from __future__ import annotations

import errno
import os
import pickle
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from biper_engine.errors import CheckpointError
from biper_engine.files import os_error
from biper_engine.training.config import TrainingConfig
from biper_engine.training.result import read_json, write_json

__all__ = ["check_claim", "check_state", "claim", "is_first_process", "versions"]

# Settings that say where things are, not what is trained.
_PLACES = ("data_dir",)


def check_claim(directory: Path, config: TrainingConfig, *, resume: bool) -> None:
    """Check that the directory can be written, and is free or has a run of the same config."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "you may not write to" if there.is_dir() else "there is a file of the name"
        raise os_error(
            errno.EACCES if there.is_dir() else errno.ENOTDIR,
            f"Cannot train in '{directory}': {reason} '{there}'. Pass another output_dir.",
        )
    stored = read_json(directory / "config.json")
    if stored is None:
        return
    if not resume and is_first_process():
        raise FileExistsError(
            f"'{directory}' holds a training run. Pass resume=True to continue it, "
            "or another output_dir."
        )
    wanted = config.to_dict()
    keys = [key for key in {**stored, **wanted} if key not in _PLACES]
    different = [key for key in keys if stored.get(key) != wanted.get(key)]
    if different:
        listing = "; ".join(
            f"{key} was {stored.get(key)}, now {wanted.get(key)}" for key in different
        )
        raise ValueError(
            f"'{directory}' holds a run with another config: {listing}. "
            "Resume with the same config, or train in another output_dir."
        )


def claim(directory: Path, config: TrainingConfig, data: Mapping[str, Any]) -> None:
    """Store config, versions and what tells the data from others in the directory.

    Raises:
        ValueError: the run in the directory has other data.
    """
    stored = read_json(directory / "data.json") or data  # an older version stored none
    different = [key for key in {**stored, **data} if stored.get(key) != data.get(key)]
    if different:
        listing = "; ".join(f"{key}: {stored.get(key)}, now {data.get(key)}" for key in different)
        raise ValueError(
            f"'{directory}' holds a run with other data: {listing}. Resume with the data of the "
            "run, or train in another output_dir."
        )
    directory.mkdir(parents=True, exist_ok=True)
    if is_first_process():
        if read_json(directory / "config.json") is None:
            write_json(directory / "data.json", data)
            write_json(directory / "config.json", config.to_dict())
        write_json(directory / "versions.json", versions())


def check_state(path: Path, config: TrainingConfig) -> None:
    """Check that Lightning's state is of this run."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"'{path}' cannot be read as the state of a run: {error}. Delete it to start its stage "
            "again."
        ) from error
    stored = state.get("biper_config") if isinstance(state, dict) else None
    if not isinstance(stored, dict) or "biper_state" not in state:
        raise CheckpointError(
            f"'{path}' is not a state that this package saved. Delete it to start its stage again."
        )
    wanted = config.to_dict()
    different = [key for key in wanted if key not in _PLACES and stored.get(key) != wanted[key]]
    if different:
        raise CheckpointError(
            f"'{path}' is the state of another run: it differs in {', '.join(different)}. Delete "
            "it to start its stage again."
        )


def is_first_process() -> bool:
    """Whether this is the process of a run that writes: rank 0 on node 0."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK")
    return all(int(os.environ.get(name, 0)) == 0 for name in names)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a run depends on."""
    found = {"python": platform.python_version()}
    for name in ("biper-engine", "torch", "lightning", "numpy", "pillow", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
