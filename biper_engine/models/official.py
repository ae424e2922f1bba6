"""Write checkpoints as the official code (edmav4/BiPer) does, for its own scripts to read."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from biper_engine.files import write_atomically
from biper_engine.models.checkpoints import (
    common_binarizer,
    common_settings,
    network_name,
)
from biper_engine.models.torch_file import CONFIG_NAME

__all__ = ["export_official"]

_CHECKPOINT_NAME = "model_best.pth.tar"


def export_official(
    directory: str | os.PathLike[str],
    model: nn.Module,
    *,
    epochs: int,
    top1: float = 0.0,
    settings: Mapping[str, str | float | bool] | None = None,
) -> Path:
    """Write `model_best.pth.tar`, and beside it a `config.txt` with frequency and stage.

    The official `main_stage2.py` reads the checkpoint with `--evaluate`, and that of stage 1 with
    `--load_ckpt_stage1`; then it takes the frequency from `config.txt`. The checkpoint has no
    optimizer state, so `--resume` does not work. `load_checkpoint` reads it, too.

    Args:
        directory: created if missing; files with these names are replaced.
        model: a network from `models.build` or `load_checkpoint`, on any device.
        epochs: how long it was trained.
        top1: accuracy in percent, for the entry `best_prec1`.
        settings: further lines of `config.txt`, with the names of the official options.

    Returns:
        The path of the checkpoint.

    Raises:
        ValueError: `model` is not from `build` or not a network of BiPer, or its layers differ in
            frequency or stage.

    Source: save_checkpoint in the official cifar10/utils/common.py and its call in main.py.
    """
    group, _, name = network_name(model).partition("/")
    frequency, stage = common_settings(model)
    if frequency is None:
        raise ValueError(
            f"`model` is {group}/{name}, wanted a network of BiPer: the official scripts know no "
            "other. Use save_checkpoint."
        )
    if common_binarizer(model) != "periodic":
        raise ValueError(
            f"`model` has the weight binarizer '{common_binarizer(model)}', wanted 'periodic': the "
            "official scripts know no other. Use save_checkpoint."
        )
    state = OrderedDict(
        (key, value.detach().cpu().contiguous()) for key, value in model.state_dict().items()
    )
    contents: dict[str, Any] = {
        "epoch": epochs,
        "model": name,
        "state_dict": state,
        "best_prec1": float(top1),
    }
    lines = {
        "model": name,
        "dataset": group,
        "epochs": epochs,
        **(settings or {}),
        "freq": float(frequency),
        "stage2": stage == 2,
    }
    text = "".join(f"{key}:  {value}\n" for key, value in lines.items())
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _CHECKPOINT_NAME
    config = f"{datetime.now()}\n\n{text}".encode()
    write_atomically(folder / CONFIG_NAME, lambda file: file.write(config))
    write_atomically(path, lambda file: torch.save(contents, file))
    return path
