"""The demo's second process: load a `.biper` file, run it on stored images, store the logits.

Called as `python -m biper_engine.cli.demo_reload FILE IMAGES.npy LOGITS.npy`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import biper_engine


def _reload(file: str, images: str, logits: str) -> None:
    engine = biper_engine.load(file)
    with torch.inference_mode():
        np.save(Path(logits), engine(torch.from_numpy(np.load(images))).numpy())


if __name__ == "__main__":
    _reload(*sys.argv[1:])
