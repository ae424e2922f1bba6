"""AdaBin's ResNet-20: binary sets {center - distance, center + distance} in place of {-1, +1}.

The first convolution and the classifier stay real. Parameter names and shapes are those of the
official checkpoint, BinaryNetworks/AdaBin/cifar10 of github.com/huawei-noah/Efficient-Computing.

Source: Tu et al., "AdaBin", ECCV 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.models.network import Network
from biper_engine.nn import BinaryLayer, binarize_activation, straight_through

__all__ = ["AdaBinResNet20", "AdaptiveConv2d", "AdaptiveSign", "Maxout"]

_WIDTHS = (16, 32, 64)
_BLOCKS = 3


class AdaptiveSign(nn.Module):
    """Map values to one of two learned ones: `alpha_a * (sign((x - beta_a) / alpha_a) + beta_a)`.

    Source: eq. 11 to 13; as in the official code, the distance also multiplies the center.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha_a = nn.Parameter(torch.tensor(1.0))
        self.beta_a = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        bits = binarize_activation((x - self.beta_a) / self.alpha_a)
        return self.alpha_a * (bits + self.beta_a)


class AdaptiveConv2d(BinaryLayer, nn.Conv2d):
    """Convolve binary activations with binary weights, both of adaptive sets.

    In stage 2 the weights of an output channel are its mean plus or minus its standard deviation:
    `mean + deviation * sign(w - mean)`. In stage 1 they are w. The surrogate of the sign is
    k * tanh(sharpness * u), with u = (w - mean) / deviation and k = max(1 / sharpness, 1).

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as nn.Conv2d; without bias.
        stage: 1 or 2; may be assigned later.

    Attributes:
        sharpness: the official training raises it from 0.1 to 10; 0.1 is nearly straight-through.

    Source: eq. 7 to 10; the surrogate is that of Qin et al., "IR-Net", CVPR 2020.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        stage: int = 2,
    ) -> None:
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, bias=False
        )
        self.binary_a = AdaptiveSign()
        self.sharpness = 0.1
        self.stage = stage

    def quantized_weight(self) -> Tensor:
        """Return the weights that the forward pass multiplies with."""
        if self.stage == 1:
            return self.weight
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = (self.weight - mean).square().mean((1, 2, 3), keepdim=True).sqrt()
        scaled = (self.weight - mean) / deviation
        surrogate = max(1 / self.sharpness, 1.0) * torch.tanh(self.sharpness * scaled)
        return straight_through(scaled.detach().sign(), surrogate) * deviation + mean

    def weight_bits(self) -> Tensor:
        """Return which weights have the larger of their two values in stage 2."""
        return self.weight >= self.weight.mean((1, 2, 3), keepdim=True)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the binarized [N, in_channels, H, W]."""
        output: Tensor = self._conv_forward(self.binary_a(input), self.quantized_weight(), None)
        return output


class Maxout(nn.Module):
    """Multiply positive and negative values by two learned factors for each channel.

    Source: section 3.4 of AdaBin.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.neg_scale = nn.Parameter(torch.full((channels,), 0.25))
        self.pos_scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        positive, negative = (scale.view(-1, 1, 1) for scale in (self.pos_scale, self.neg_scale))
        return positive * F.relu(x) - negative * F.relu(-x)


class PaddingShortcut(nn.Module):
    """Option A of the ResNet paper: every second pixel, zero channels on both sides."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class AdaBinBlock(nn.Module):
    """Two binary 3x3 convolutions, each with BatchNorm, a shortcut and Maxout."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, stage: int) -> None:
        super().__init__()
        self.conv1 = AdaptiveConv2d(in_channels, channels, 3, stride, padding=1, stage=stage)
        self.bn1 = nn.BatchNorm2d(channels)
        self.nonlinear1 = Maxout(channels)
        self.conv2 = AdaptiveConv2d(channels, channels, 3, padding=1, stage=stage)
        self.bn2 = nn.BatchNorm2d(channels)
        self.nonlinear2 = Maxout(channels)
        self.shortcut = nn.Identity() if stride == 1 else PaddingShortcut(channels // 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y += self.shortcut(x)
        y = self.nonlinear1(y)
        z = self.bn2(self.conv2(y))
        z += y
        activated: Tensor = self.nonlinear2(z)
        return activated


class AdaBinResNet20(Network):
    """16, 32 and 64 channels, three blocks each."""

    def __init__(self, num_classes: int = 10, *, stage: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.nonlinear1 = Maxout(16)
        in_channels = _WIDTHS[0]
        for index, channels in enumerate(_WIDTHS):
            layer = nn.Sequential()
            for position in range(_BLOCKS):
                stride = 2 if index > 0 and position == 0 else 1
                layer.append(AdaBinBlock(in_channels, channels, stride, stage=stage))
                in_channels = channels
            self.add_module(f"layer{index + 1}", layer)
        self.bn2 = nn.BatchNorm1d(64)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, 32, 32]."""
        x = self.nonlinear1(self.bn1(self.conv1(x)))
        for index in range(len(_WIDTHS)):
            x = self.get_submodule(f"layer{index + 1}")(x)
        x = F.avg_pool2d(x, x.size(3)).flatten(1)
        logits: Tensor = self.linear(self.bn2(x))
        return logits
