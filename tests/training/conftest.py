"""A finished run of two epochs for each stage, for tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from biper_engine.training import RunOptions, StageConfig, TrainingConfig, fit
from tests.training.few_images import few_images

SMALL_STAGE = StageConfig(epochs=2, lr=0.05, weight_decay=1e-3, tau=0.02)
SMALL_CONFIG = TrainingConfig(stage1=SMALL_STAGE, stage2=SMALL_STAGE, batch_size=16)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run; do not change it."""
    path, threads = tmp_path_factory.mktemp("small") / "run", torch.get_num_threads()
    torch.set_num_threads(1)
    with few_images():
        options = RunOptions(progress_bar=False, accelerator="cpu")
        fit(config=SMALL_CONFIG, output_dir=path, options=options)
    torch.set_num_threads(threads)
    return path
