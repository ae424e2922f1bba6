"""Layers of networks whose weights are a scale times a sign, and learned shifts around signs.

Unlike BiPer's layers, the products here take their input as it is: the sign of the activations is a
layer of its own, such as `RSign`, or `binarize_activation`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.nn.binary_layer import BinaryLayer
from biper_engine.nn.functional import binarize_activation, straight_through

__all__ = ["FlatSignConv2d", "RPReLU", "RSign", "Shift", "SignConv2d", "SignLinear"]


class Shift(nn.Module):
    """Add a learned number to each channel of [N, C, H, W]; `bias`, [1, C, 1, 1], starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class RSign(Shift):
    """Take the sign after a learned shift: `sign(x + bias)`, with a threshold for each channel.

    Source: Liu et al., "ReActNet", ECCV 2020, eq. 1; the surrogate gradient is Bi-Real Net's.
    """

    def forward(self, x: Tensor) -> Tensor:
        return binarize_activation(x + self.bias)


class RPReLU(nn.Module):
    """PReLU with a learned shift before and after it: `prelu(x - move1) + move2`.

    Args:
        channels: size of `move1`, `move2` and `prelu.weight`.
        dim: 1 for maps [N, C, ...], -1 for tokens [N, T, C].

    Source: Liu et al., "ReActNet", ECCV 2020, eq. 2.
    """

    def __init__(self, channels: int, *, dim: int = 1) -> None:
        super().__init__()
        self.move1 = nn.Parameter(torch.zeros(channels))
        self.prelu = nn.PReLU(channels)
        self.move2 = nn.Parameter(torch.zeros(channels))
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        channels_first = x.movedim(self.dim, 1)
        shape = (-1, *[1] * (x.dim() - 2))
        y = self.prelu(channels_first - self.move1.view(shape)) + self.move2.view(shape)
        moved: Tensor = y.movedim(1, self.dim)
        return moved


def scaled_sign(weight: Tensor, *, centred: bool = False) -> Tensor:
    """Return `mean|w| * sign(w)` with one scale for each output channel.

    The gradient is that of clamp(w, -1, 1), and none reaches the scale.

    Args:
        weight: output channels first.
        centred: sign and clamp are those of w minus its mean over the output channel.
    """
    dims = tuple(range(1, weight.dim()))
    scale = weight.detach().abs().mean(dims, keepdim=True)
    signed = weight - weight.mean(dims, keepdim=True) if centred else weight
    return straight_through(scale * signed.detach().sign(), signed.clamp(-1, 1))


class SignConv2d(BinaryLayer, nn.Conv2d):
    """Convolve with `mean|w| * sign(w)` in stage 2 and with w itself in stage 1.

    The input is multiplied as it is. Without a bias; the padding is 0.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, groups: as nn.Conv2d.
        stage: 1 or 2; may be assigned later.

    Source: Liu et al., "Bi-Real Net", ECCV 2018, eq. 9 and 11.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        *,
        stage: int = 2,
    ) -> None:
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, 1, groups, bias=False
        )
        self.stage = stage

    def quantized_weight(self) -> Tensor:
        """Return the weights that the forward pass multiplies with."""
        weight = self.latent()
        return weight if self.stage == 1 else scaled_sign(weight)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of [N, in_channels, H, W]."""
        output: Tensor = self._conv_forward(input, self.quantized_weight(), None)
        return output

    def extra_repr(self) -> str:
        """Add the stage to PyTorch's description of the layer."""
        described: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{described}, stage={self.stage}"


class FlatSignConv2d(SignConv2d):
    """`SignConv2d` whose parameter is `weights` of shape [number of weights, 1].

    The checkpoints of Bi-Real Net and of ReActNet-A have it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.shape = self.weight.shape
        self.weights = nn.Parameter(self.weight.detach().reshape(-1, 1))
        del self.weight

    def latent(self) -> Tensor:
        """Return the real weights in the shape of a convolution's."""
        return self.weights.view(self.shape)


class SignLinear(BinaryLayer, nn.Linear):
    """Multiply with `mean|w| * sign(w - mean(w))` in stage 2 and with w itself in stage 1.

    The means are over the input features of each output feature. The input is multiplied as it is.

    Args:
        in_features, out_features: as nn.Linear.
        stage: 1 or 2; may be assigned later.

    Source: Le and Li, "BinaryViT", CVPR workshops 2023, section 3.
    """

    def __init__(self, in_features: int, out_features: int, *, stage: int = 2) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=False)
        self.stage = stage

    def quantized_weight(self) -> Tensor:
        """Return the weights that the forward pass multiplies with."""
        return self.weight if self.stage == 1 else scaled_sign(self.weight, centred=True)

    def weight_bits(self) -> Tensor:
        """Return which weights are positive in stage 2."""
        return self.weight >= self.weight.mean(1, keepdim=True)

    def forward(self, input: Tensor) -> Tensor:
        """Return the product of [..., in_features]."""
        return F.linear(input, self.quantized_weight())

    def extra_repr(self) -> str:
        """Add the stage to PyTorch's description of the layer."""
        return f"{super().extra_repr()}, stage={self.stage}"
