"""The float network with PyTorch's best settings: eager and compiled."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, fx, nn

from biper_engine.bench.rivals.recipe import TWIN
from biper_engine.bench.rivals.rival import Rival, check_images, checked, first_line

__all__ = [
    "COMPILED",
    "COMPILED_BF16",
    "EAGER",
    "compiled_bf16_rival",
    "compiled_rival",
    "eager_rival",
    "eager_twin_rival",
]

EAGER, COMPILED, COMPILED_BF16 = "float, eager", "float, torch.compile", "torch.compile bf16"


def eager_rival(model: nn.Module) -> Rival:
    """Return the network as it is: eager, float32, in channels_last memory."""
    how = "float32, channels_last, as the model is written"
    return Rival(name=EAGER, how=how, call=_channels_last(model))


def eager_twin_rival(twin: fx.GraphModule, images: Tensor) -> Rival:
    """Return the float twin in eager float32, in channels_last memory, checked; it is not timed.

    Args:
        twin: a copy of it is called.
        images: the batch.
    """
    network = _channels_last(twin)
    rival = Rival(
        name="PyTorch f32",
        how=f"{TWIN}, eager, float32, channels_last",
        call=lambda batch: network(batch)[0],
        wanted=lambda batch: twin(batch)[0],
        beside=TWIN,
    )
    return checked(rival, check_images(images))


def compiled_rival(model: nn.Module, images: Tensor) -> Rival:
    """Return the network with `torch.compile`, compiled for exactly this batch.

    Inductor's freezing is on: it computes once what depends only on parameters, folds BatchNorm,
    and lays weights out for oneDNN. The network is compiled in `torch.inference_mode` and must be
    called in it: in another mode, PyTorch compiles again, without freezing.

    Args:
        model: a copy of it is compiled, in eval mode.
        images: the batch, channels_last.
    """
    how = "float32, channels_last, freezing, static shapes"
    # Every batch size compiles the same code again; past a limit, PyTorch would silently run eager.
    torch.compiler.reset()
    return _compiled(COMPILED, how, _channels_last(model), images)


def compiled_bf16_rival(network: fx.GraphModule, images: Tensor) -> Rival:
    """Return a network in bfloat16 with `torch.compile`, with the settings of float32.

    Call it after `compiled_rival`, which drops everything that was compiled before.

    Args:
        network: float32, with constants folded, so that bfloat16 does not round latent weights
            before they are binarized; a copy of it is compiled.
        images: the batch, channels_last, float32; the time does not include rounding it.
    """
    how = "bfloat16, the network with its weights binarized in float32; else as torch.compile"
    half = _channels_last(network).to(torch.bfloat16)
    rival = _compiled(COMPILED_BF16, how, half, images.bfloat16())
    call = rival.call
    if call is None:
        return rival
    return Rival(
        name=rival.name,
        how=how,
        call=lambda batch: call(batch.bfloat16()),
        bind=lambda batch: partial(call, batch.bfloat16()),
    )


def _compiled(name: str, how: str, network: nn.Module, images: Tensor) -> Rival:
    from torch._inductor import config

    compiled = torch.compile(network, dynamic=False)
    try:
        with torch.inference_mode(), config.patch(freezing=True):
            compiled(images)
    except RuntimeError as error:  # no C++ compiler, or a network that does not compile
        return Rival(name=name, how=how, reason=first_line(error))
    return Rival(name=name, how=how, call=compiled)


def _channels_last(model: nn.Module) -> nn.Module:
    network = copy.deepcopy(model).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
