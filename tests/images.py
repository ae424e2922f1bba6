"""Noise, and images of it: the same each time."""

import torch
from torch import Tensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return float32 values of the standard normal distribution."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count: int = 3, *shape: int, seed: int = 3) -> Tensor:
    """Return `[count, *shape]` of noise; 3x8x8 images by default."""
    return noise(count, *(shape or (3, 8, 8)), seed=seed)
