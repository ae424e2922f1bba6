"""A converted network as PyTorch's exporters take it: flat inputs, a free batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["BATCH", "Flat", "free_batch"]

BATCH = "batch"


class Flat(nn.Module):
    """A graph that returns a tensor instead of a tuple of one.

    Args:
        network: takes tensors, returns a tuple.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        outputs = self.network(*inputs)
        return outputs[0] if len(outputs) == 1 else outputs


def free_batch(batched: Sequence[bool]) -> Any:
    """Return `dynamic_shapes` of a `Flat` whose batch may have any size from 1.

    Args:
        batched: for each input, whether its first dimension is the batch.
    """
    free = {0: torch.export.Dim(BATCH, min=1)}
    return (tuple(free if has_batch else None for has_batch in batched),)
