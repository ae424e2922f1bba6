"""A run of few images, for `torchrun`; arguments: output folder, accumulated batches, devices."""

import sys

import torch

from biper_engine.training import RunOptions, StageConfig, TrainingConfig, fit
from tests.training.few_images import few_images


def main(folder: str, accumulate: str, devices: str) -> None:
    torch.set_num_threads(1)
    stage = StageConfig(epochs=2, lr=0.05, weight_decay=1e-3, tau=0.02)
    config = TrainingConfig(
        stage1=stage, stage2=stage, batch_size=8, accumulate=int(accumulate), frequency=20
    )
    strategy = "ddp" if int(devices) > 1 else "auto"
    options = RunOptions(
        accelerator="cpu", devices=int(devices), strategy=strategy, progress_bar=False
    )
    with few_images():
        fit(config=config, output_dir=folder, options=options)


if __name__ == "__main__":
    main(*sys.argv[1:])
