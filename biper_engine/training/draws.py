"""Random numbers that depend on a seed, an epoch and an image's index, and on nothing else.

An image is augmented alike whichever process, worker and batch it is in, so that runs with other
numbers of workers or devices, and resumed runs, see the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["stage_seed", "uniform"]

_Words = NDArray[np.uint64]
# Constants of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
# OOPSLA 2014, figure 17): a step of the counter, and the multipliers of the mixing function.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def uniform(seed: int, epoch: int, indices: Sequence[int], count: int) -> Tensor:
    """Return numbers in [0, 1), the same for the same seed, epoch, index and column.

    Args:
        seed: 0 or more.
        epoch: 0 or more.
        indices: of images; one row each.
        count: columns.

    Returns:
        [len(indices), count] float32; every value is a multiple of 2^-24.
    """
    with np.errstate(over="ignore"):  # wraps around, as it has to
        key = _mix(_mix(np.asarray([seed % 2**64], np.uint64) + _STEP) ^ np.uint64(epoch))
        rows = _mix(key ^ np.asarray(indices, np.uint64))[:, None]
        words = _mix(rows + _STEP * np.arange(1, count + 1, dtype=np.uint64))
    return torch.from_numpy((words >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def stage_seed(seed: int, stage: int) -> int:
    """Return the base to which the epoch number is added; a stage has room for 2^16 epochs."""
    return (seed * 2 + stage) << 16


def _mix(words: Any) -> _Words:
    """Spread each bit over the word (SplitMix64's mix64)."""
    words = (words ^ (words >> np.uint64(30))) * _MULTIPLIERS[0]
    words = (words ^ (words >> np.uint64(27))) * _MULTIPLIERS[1]
    mixed: _Words = words ^ (words >> np.uint64(31))
    return mixed
