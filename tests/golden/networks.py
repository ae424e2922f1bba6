"""The networks of this package with golden weights, each converted once for a test run."""

from functools import cache
from pathlib import Path

import pytest
import torch

from biper_engine.conversion import convert
from biper_engine.models import Network, available, build
from biper_engine.models.registry import architecture
from tests.golden import weights
from tests.native.builds import shared

# The networks whose official code gave the golden values.
BIPER = tuple(name for name in available() if architecture(name).frequency is not None)

# Those with 11 million weights and more wait for the deep tests, but for one of them.
_LARGE = tuple(name for name in BIPER if "resnet18" in name or "resnet34" in name)
LARGE_ARE_DEEP = [
    pytest.param(name, marks=[pytest.mark.deep] * (name in _LARGE[1:])) for name in BIPER
]


def model_of(name: str) -> Network:
    model = build(name, frequency=20, stage=2).eval()
    model.load_state_dict(weights.tensors(model))
    return model


@cache
def golden_images(name: str, count: int = 4) -> torch.Tensor:
    return torch.from_numpy(weights.images(name, count, build(name).input_shape[1]))


def converted_file(
    temporary: pytest.TempPathFactory, name: str, dtype: torch.dtype = torch.float32
) -> Path:
    """Return the file of a converted network, which all processes of a test run share."""

    def convert_it(folder: Path) -> Path:
        path = folder / "network.biper"
        engine = convert(model_of(name), unconverted="ignore", check=False, compute_dtype=dtype)
        engine.save(path)
        return path

    return shared(temporary, f"{name}-{dtype}".replace("/", "-"), convert_it)
