"""The float network as PyTorch runs it best: what an engine is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["COMPILED", "EAGER", "Rival", "compiled_rival", "eager_rival"]

EAGER, COMPILED = "float, eager", "float, torch.compile"


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A way to run the float network, or why it cannot run here.

    Attributes:
        name: as tables show it.
        how: one line about its settings.
        call: takes images, returns what the network returns; None where `reason` is given.
        reason: why it does not run; empty where it does.
    """

    name: str
    how: str
    call: Callable[[Tensor], Any] | None = None
    reason: str = ""


def eager_rival(model: nn.Module) -> Rival:
    """Return the network as it stands: eager, float32, in channels_last memory."""
    how = "float32, channels_last, as the model is written"
    return Rival(name=EAGER, how=how, call=_channels_last(model))


def compiled_rival(model: nn.Module, images: Tensor) -> Rival:
    """Return the network through `torch.compile`, compiled for this very batch.

    Inductor's freezing is on: it computes once what depends on parameters alone, folds BatchNorm,
    and lays weights out for oneDNN. It is compiled in `torch.inference_mode`, and is to be called
    in it: in another mode PyTorch compiles again, and without freezing.

    Args:
        model: a copy of it is compiled, in eval mode.
        images: the batch, channels_last.
    """
    from torch._inductor import config

    how = "float32, channels_last, freezing, static shapes"
    # Every batch size compiles the same code again; past a limit PyTorch would quietly run eager.
    torch.compiler.reset()
    network = torch.compile(_channels_last(model), dynamic=False)
    try:
        with torch.inference_mode(), config.patch(freezing=True):
            network(images)
    except RuntimeError as error:  # no C++ compiler, or a network that does not compile
        lines = str(error).strip().splitlines()
        return Rival(name=COMPILED, how=how, reason=lines[0] if lines else type(error).__name__)
    return Rival(name=COMPILED, how=how, call=network)


def _channels_last(model: nn.Module) -> nn.Module:
    network = copy.deepcopy(model).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
