"""BNext: MobileNet's layout with binary convolutions, gates, and real shortcuts.

The first convolution, the gates and the classifier stay real. Parameter names and shapes are those
of the official code, src/bnext.py of github.com/hpi-xnor/BNext. Some are not used: the PReLU of the
first layer, and `activation1` of the blocks without a gated shortcut.

Source: Guo et al., "Join the High Accuracy Club on ImageNet with A Binary Neural Network Ticket",
arXiv:2211.12933, 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.models.network import Network
from biper_engine.nn import BinaryLayer, Shift, straight_through

__all__ = ["AnnealedConv2d", "BNext"]

# Surrogates pass gradients, and latent weights stay, between minus and plus this.
_LIMIT = 1.5
# Weights are signs at temperatures below this.
_COLD = 1e-7
_GATE_RATIO = 8


class ClippedSign(nn.Module):
    """Take the sign, with the gradient of clamp(x, -1.5, 1.5). Its `temperature` is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return straight_through(x.detach().sign(), x.clamp(-_LIMIT, _LIMIT))


class AnnealedConv2d(BinaryLayer, nn.Conv2d):
    """Convolve with clamp(w / temperature, -1, 1), or with sign(w) below a temperature of 1e-7.

    The gradient of the weights is straight-through. In training mode, w is kept in [-1.5, 1.5].

    Args:
        in_channels, out_channels, kernel_size, stride: as nn.Conv2d; padded to keep the size.
        stage: 1 sets the temperature to 1, from which the official training lowers it by a tenth
            each epoch; 2 sets it to 0.

    Attributes:
        temperature: [1] buffer; `stage` is read from it, too.
    """

    temperature: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, *, stage: int
    ) -> None:
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False
        )
        nn.init.normal_(self.weight, 0, 1e-3)
        self.register_buffer("temperature", torch.ones(1))
        self.stage = stage

    @property
    def stage(self) -> int:
        """1: weights between -1 and 1. 2: binary weights."""
        return 2 if self.temperature.item() < _COLD else 1

    @stage.setter
    def stage(self, stage: int) -> None:
        self.temperature.fill_(1.0 if self._checked(stage) == 1 else 0.0)

    def quantized_weight(self) -> Tensor:
        """Return the weights that the forward pass multiplies with."""
        weight = self.weight.detach()
        warm = (weight / self.temperature.clamp(min=1e-8)).clamp(-1, 1)
        value = torch.where(self.temperature < _COLD, weight.sign(), warm)
        return straight_through(value, self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of [N, in_channels, H, W]."""
        if self.training:
            with torch.no_grad():
                self.weight.clamp_(-_LIMIT, _LIMIT)
        output: Tensor = self._conv_forward(input, self.quantized_weight(), None)
        return output


class Gate(nn.Module):
    """Squeeze and excitation: a factor between 0 and 1 for each channel of each image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // _GATE_RATIO, 1),
            nn.ReLU(),
            nn.Conv2d(channels // _GATE_RATIO, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.se(x))


class Processor(nn.Module):
    """A binary convolution whose result is gated by a mixture of itself and its input.

    The shares of the mixture, `scale` and 1 - `scale`, are kept in [0, 1] while training.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int, *, stage: int) -> None:
        super().__init__()
        self.move = Shift(channels)
        self.binary_activation = ClippedSign()
        self.binary_conv = AnnealedConv2d(channels, channels, kernel_size, stride, stage=stage)
        self.norm1 = nn.BatchNorm2d(channels)
        self.norm2 = nn.BatchNorm2d(channels)
        self.activation1 = nn.PReLU(channels)
        self.activation2 = nn.PReLU(channels)
        self.se = Gate(channels)
        self.scale = nn.Parameter(torch.full((1, channels, 1, 1), 0.5))
        self.stride = stride

    def gated(self, x: Tensor) -> Tensor:
        """Return the gated result of the convolution, before `norm2`."""
        y = self.binary_conv(self.binary_activation(self.move(x)))
        y = self.activation2(self.norm1(y))
        scale = self._share()
        mixture = scale * self.halved(x) + (1 - scale) * y
        gated: Tensor = self.se(mixture) * y
        return gated

    def halved(self, x: Tensor) -> Tensor:
        """Return x at the size of the result."""
        return x if self.stride == 1 else F.avg_pool2d(x, 2)

    def _share(self) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.scale.clamp_(0, 1)
        return self.scale


class GatedShortcut(Processor):
    """The result, times a shortcut of its own, is added to that shortcut: element attention."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.halved(self.activation1(x))
        y: Tensor = self.norm2(self.gated(x) * shortcut)
        return y + shortcut


class PlainShortcut(Processor):
    """The result is added to the input."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm2(self.gated(x))
        return y + self.halved(x)


class PointwiseShortcut(PlainShortcut):
    """The same with a 1x1 convolution. The official code limits `scale` here in eval mode, too."""

    def __init__(self, channels: int, *, stage: int) -> None:
        super().__init__(channels, 1, 1, stage=stage)

    def _share(self) -> Tensor:
        return super()._share() if self.training else self.scale.clamp(0, 1)


class BNextBlock(nn.Module):
    """A 3x3 convolution, then a 1x1 convolution, or two side by side to double the channels."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, *, gated: bool, stage: int
    ) -> None:
        super().__init__()
        spatial = GatedShortcut if gated else PlainShortcut
        self.Attention = spatial(in_channels, 3, stride, stage=stage)
        self.doubles = channels != in_channels
        if self.doubles:
            self.FFN_1 = PointwiseShortcut(in_channels, stage=stage)
            self.FFN_2 = PointwiseShortcut(in_channels, stage=stage)
        else:
            self.FFN = PointwiseShortcut(in_channels, stage=stage)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Attention(x)
        if self.doubles:
            return torch.cat([self.FFN_1(x), self.FFN_2(x)], 1)
        mixed: Tensor = self.FFN(x)
        return mixed


class Stem(nn.Module):
    """A real 3x3 convolution of stride 2 with BatchNorm. Its `prelu` is not used."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn1(self.conv1(x))
        return y


def _widths(width: int, depths: tuple[int, int, int, int]) -> list[int]:
    """Return the channels behind the stem and behind each block."""
    repeated = [width * 4 * 2**index for index, depth in enumerate(depths) for _ in range(depth)]
    return [width, 2 * width, *repeated]


class BNext(Network):
    """Blocks that double the channels four or five times, and halve the map where they do.

    Args:
        width: channels behind the first convolution.
        depths: blocks of 4, 8, 16 and 32 times that many channels.
    """

    input_shape = (3, 224, 224)

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        width: int = 32,
        depths: tuple[int, int, int, int] = (2, 2, 6, 2),
        stage: int = 2,
    ) -> None:
        super().__init__()
        widths = _widths(width, depths)
        self.feature = nn.ModuleList([Stem(width)])
        for index in range(1, len(widths)):
            in_channels, channels = widths[index - 1 : index + 1]
            stride = 2 if index > 1 and channels != in_channels else 1
            self.feature.append(
                BNextBlock(in_channels, channels, stride, gated=index % 2 == 0, stage=stage)
            )
        self.prelu = nn.PReLU(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, 224, 224]."""
        for block in self.feature:
            x = block(x)
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(self.prelu(x), 1).flatten(1))
        return logits
