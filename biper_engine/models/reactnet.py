"""ReActNet-A: MobileNetV1 with binary 3x3 and 1x1 convolutions and a shortcut around each.

The first convolution and the classifier stay real. A block that doubles the channels has two 1x1
convolutions, whose results are concatenated. Parameter names and shapes are those of the official
code, mobilenet/2_step2 of github.com/liuzechun/ReActNet.

Source: Liu et al., "ReActNet", ECCV 2020, sections 4.1 and 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.models.network import Network
from biper_engine.nn import FlatSignConv2d, RSign, Shift

__all__ = ["ReActNetA"]

# (output channels in multiples of the first convolution's, stride) of each block.
_BLOCKS = ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), *((16, 1),) * 5, (32, 2), (32, 1))


class Stem(nn.Module):
    """A real 3x3 convolution of stride 2 with BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn1(self.conv1(x))
        return y


class ReActNetBlock(nn.Module):
    """RSign, binary convolution, BatchNorm, shortcut, RPReLU: once with 3x3, once with 1x1."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, stage: int) -> None:
        super().__init__()
        self.move11 = RSign(in_channels)
        self.binary_3x3 = FlatSignConv2d(in_channels, in_channels, 3, stride, 1, stage=stage)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.move12 = Shift(in_channels)
        self.prelu1 = nn.PReLU(in_channels)
        self.move13 = Shift(in_channels)
        self.move21 = RSign(in_channels)
        if channels == in_channels:
            self.binary_pw = FlatSignConv2d(in_channels, channels, 1, stage=stage)
            self.bn2 = nn.BatchNorm2d(channels)
        else:
            self.binary_pw_down1 = FlatSignConv2d(in_channels, in_channels, 1, stage=stage)
            self.binary_pw_down2 = FlatSignConv2d(in_channels, in_channels, 1, stage=stage)
            self.bn2_1 = nn.BatchNorm2d(in_channels)
            self.bn2_2 = nn.BatchNorm2d(in_channels)
        self.move22 = Shift(channels)
        self.prelu2 = nn.PReLU(channels)
        self.move23 = Shift(channels)
        self.stride = stride
        self.doubles = channels != in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.binary_3x3(self.move11(x)))
        y += x if self.stride == 1 else F.avg_pool2d(x, 2)
        y = self.move13(self.prelu1(self.move12(y)))
        moved: Tensor = self.move23(self.prelu2(self.move22(self._pointwise(y))))
        return moved

    def _pointwise(self, x: Tensor) -> Tensor:
        bits = self.move21(x)
        if not self.doubles:
            y: Tensor = self.bn2(self.binary_pw(bits))
            return y + x
        halves = (self.bn2_1(self.binary_pw_down1(bits)), self.bn2_2(self.binary_pw_down2(bits)))
        return torch.cat([half + x for half in halves], 1)


class ReActNetA(Network):
    """13 blocks from 32 to 1024 channels.

    Args:
        width: channels of the first convolution; the last block has 32 times as many.
    """

    input_shape = (3, 224, 224)

    def __init__(self, num_classes: int = 1000, *, width: int = 32, stage: int = 2) -> None:
        super().__init__()
        in_channels = width
        self.feature = nn.ModuleList([Stem(width)])
        for multiple, stride in _BLOCKS:
            channels = multiple * width
            self.feature.append(ReActNetBlock(in_channels, channels, stride, stage=stage))
            in_channels = channels
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, 224, 224]."""
        for block in self.feature:
            x = block(x)
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits
