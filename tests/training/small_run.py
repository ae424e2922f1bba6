"""A run of two epochs for each stage."""

from __future__ import annotations

from pathlib import Path

import torch

from biper_engine.training import RunOptions, StageConfig, TrainingConfig, fit
from tests.training.few_images import few_images

SMALL_STAGE = StageConfig(epochs=2, lr=0.05, weight_decay=1e-3, tau=0.02)
SMALL_CONFIG = TrainingConfig(stage1=SMALL_STAGE, stage2=SMALL_STAGE, batch_size=16)


def train_small(path: Path) -> Path:
    """Train in a folder, and return it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with few_images():
        options = RunOptions(progress_bar=False, accelerator="cpu")
        fit(config=SMALL_CONFIG, output_dir=path, options=options)
    torch.set_num_threads(threads)
    return path
