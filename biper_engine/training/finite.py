"""Find out where numbers stopped being finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from biper_engine.errors import NotFiniteError

__all__ = ["not_finite"]


def not_finite(
    network: nn.Module, images: Tensor | None, loss: Tensor, stage: int, position: tuple[int, int]
) -> NotFiniteError:
    """Return an error that names the parameter or layer from which a bad loss comes.

    Args:
        network: in the state in which the loss was computed.
        images: the batch, or None if it is gone.
        loss: infinite or NaN.
        stage: 1 or 2.
        position: epoch, and batches done in it.
    """
    where = _bad_parameter(network) or (None if images is None else _bad_layer(network, images))
    return NotFiniteError(
        f"The loss of stage {stage} became {loss.item()} in epoch {position[0] + 1}, batch "
        f"{position[1]}: {where or 'every layer is finite, but the loss itself is not'}. The state "
        f"saved before is kept; train again with a smaller stage{stage}.lr, or, if precision is "
        "not 32-true, with that."
    )


def _bad_parameter(network: nn.Module) -> str | None:
    for name, parameter in network.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"'{name}' has values that are not finite since an earlier step"
    return None


@torch.no_grad()
def _bad_layer(network: nn.Module, images: Tensor) -> str | None:
    """Run the network again, and return the first layer whose output is not finite."""
    if not torch.isfinite(images).all():
        return "the images have values that are not finite"
    found: list[str] = []

    def look(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(f"the output of layer '{name}' ({type(module).__name__}) is not")

        handles.append(module.register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in network.named_modules():
        if name and next(module.children(), None) is None:
            look(name, module)
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return f"{found[0]} finite" if found else None
