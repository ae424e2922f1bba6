"""Deterministic weights and inputs for a state dict given as names and shapes.

Every array comes from its own NumPy PCG64 stream seeded by its name, so that any process can
rebuild the same checkpoint without storing it. Scales keep activations near unit variance.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Shapes = Mapping[str, Sequence[int]]


def read(name: str) -> dict[str, Any]:
    """Return the contents of `<name>.json` in this directory."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text())


def state(shapes: Shapes) -> dict[str, np.ndarray]:
    """Return an array for every name, in the order of `shapes`."""
    return {name: _array(name, tuple(shape), shapes) for name, shape in shapes.items()}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict for `model`, made of its names and shapes."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    return {name: torch.from_numpy(np.array(array)) for name, array in state(shapes).items()}


def images(tag: str, count: int, size: int) -> np.ndarray:
    """Return [count, 3, size, size] float32 images of standard normal noise."""
    return _rng(f"images:{tag}", 7).normal(0, 1, (count, 3, size, size)).astype(np.float32)


def _rng(name: str, salt: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), salt]))


def _array(name: str, shape: tuple[int, ...], shapes: Shapes) -> np.ndarray:
    rng = _rng(name)
    owner, _, last = name.rpartition(".")
    if last == "num_batches_tracked":
        return np.asarray(100, dtype=np.int64)
    if last in ("tau", "beta"):
        return np.ones(shape, np.float32)
    if last == "alpha":
        values = _signed(rng, shape, negative=0.15) / sqrt(prod(shapes[f"{owner}.weight"][1:]))
    elif last == "running_mean":
        values = rng.normal(0, 0.3, shape)
    elif last == "running_var":
        values = rng.uniform(0.5, 1.5, shape)
    elif last == "bias":
        values = rng.normal(0, 0.2, shape)
    elif len(shape) == 1:  # the weight of a BatchNorm
        values = _signed(rng, shape, negative=0.1)
    elif f"{owner}.alpha" in shapes:  # the latent weight of a binary convolution
        values = rng.normal(0, 0.06, shape)
    else:
        values = rng.normal(0, 1, shape) / sqrt(prod(shape[1:]))
    return values.astype(np.float32)


def _signed(rng: np.random.Generator, shape: tuple[int, ...], *, negative: float) -> np.ndarray:
    """Draw magnitudes in [0.5, 1.5), a share of them negative."""
    sign = np.where(rng.random(shape) < negative, -1.0, 1.0)
    return sign * rng.uniform(0.5, 1.5, shape)
