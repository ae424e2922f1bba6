"""The step `digits`: how often the half streams of a trained network have the exact mode's class.

DIGITS names a checkpoint of a network trained on scikit-learn's handwritten digits (`biper train`),
from which every stream is converted. A `.biper` file is of one stream, and only its accuracy is
measured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_steps import SKIPPED

if TYPE_CHECKING:
    from torch import Tensor

    from biper_engine import Engine

WANTED = 0.995


def agreement(engines: Mapping[str, Engine], images: Tensor, classes: Tensor) -> dict[str, Any]:
    """Return each stream's accuracy, and on how many images it has the exact mode's class."""
    from gpu_prepare import accepted

    found = {
        stream: engine(accepted(engine, images, stream)).argmax(1).cpu()
        for stream, engine in engines.items()
    }
    exact = found.get("float32")
    return {
        stream: {
            "accuracy": float((got == classes).float().mean()),
            "same_class": None if exact is None else int((got == exact).sum()),
            "images": len(images),
        }
        for stream, got in found.items()
    }


def engines_of(path: Path) -> dict[str, Engine]:
    """Return engines by stream."""
    from gpu_prepare import STREAMS

    from biper_engine import convert, load, load_checkpoint

    if path.suffix == ".biper":
        engine = load(path)
        return {str(engine.options.get("compute_dtype", "float32")): engine}
    model = load_checkpoint(path)
    return {stream: convert(model, compute_dtype=dtype) for stream, dtype in STREAMS.items()}


def main() -> int:
    named = os.environ.get("DIGITS", "")
    if not named:
        print("DIGITS names no network")
        return SKIPPED
    import torch
    from gpu_machine import keep, missing, no_gpu

    reason = no_gpu()
    if reason is not None:
        print(f"no GPU: {reason}")
        return 1
    absent = missing("sklearn", "PIL")
    if absent or not Path(named).exists():
        print(f"not installed: {', '.join(absent)}" if absent else f"{named} is not there")
        return 1
    from biper_engine.training import data

    device = torch.device("cuda")
    engines = {stream: engine.to(device) for stream, engine in engines_of(Path(named)).items()}
    images, classes = data.load("digits").test
    with torch.inference_mode():
        found = agreement(engines, images.to(device), classes)
    keep("digits", found)
    for stream, entry in found.items():
        print(f"{stream}: {entry}")
    same = found.get("float16", {}).get("same_class")
    if same is None:
        print("one stream only: there is nothing to compare it with")
        return 0
    share = same / len(images)
    print(f"float16 has the exact mode's class on {share:.2%} of {len(images)} images")
    return 0 if share >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
