"""What all layers with binary weights have in common."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

__all__ = ["BinaryLayer", "binary_layers"]


class BinaryLayer:
    """Latent weights, and the weights of each stage made of them. Mixed into nn.Module.

    Stage 1 multiplies with real weights, to start from; stage 2 with binary ones.
    """

    weight: Tensor
    _stage: int

    @property
    def stage(self) -> int:
        """1: real weights. 2: binary weights."""
        return self._stage

    @stage.setter
    def stage(self, stage: int) -> None:
        self._stage = self._checked(stage)

    def latent(self) -> Tensor:
        """Return the real weights that training updates."""
        return self.weight

    def quantized_weight(self) -> Tensor:
        """Return the weights that the forward pass multiplies with."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its weights become.")

    def weight_bits(self) -> Tensor:
        """Return which weights are positive in stage 2, in the shape of `latent`."""
        return self.latent() >= 0

    @staticmethod
    def _checked(stage: int) -> int:
        if stage not in (1, 2):
            raise ValueError(f"`stage` (={stage!r}) must be 1 or 2.")
        return stage


def binary_layers(module: nn.Module) -> Iterator[tuple[str, BinaryLayer]]:
    """Yield (name, layer) for every binary layer in `module`, in `named_modules` order."""
    for name, layer in module.named_modules():
        if isinstance(layer, BinaryLayer):
            yield name, layer
