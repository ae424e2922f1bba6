"""Bi-Real Net-18: a shortcut around every binary 3x3 convolution; and ReActNet's form of it.

The first convolution, the 1x1 convolutions of the shortcuts that halve the map, and the classifier
stay real. Parameter names and shapes are those of the official code: for Bi-Real Net,
pytorch_implementation/BiReal18_34 of github.com/liuzechun/Bi-Real-net; for ReActNet, resnet/2_step2
of github.com/liuzechun/ReActNet.

Source: Liu et al., "Bi-Real Net", ECCV 2018; Liu et al., "ReActNet", ECCV 2020.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.models.network import Network
from biper_engine.nn import FlatSignConv2d, RSign, Shift, SignConv2d, binarize_activation

__all__ = ["BiRealNet18", "ReActResNet18"]

_MULTIPLES = (1, 2, 4, 8)
_BLOCKS = 4  # with one convolution each


def _projection(in_channels: int, channels: int, stride: int) -> nn.Module:
    """Return what a shortcut does: nothing where no shape changes."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(
        nn.AvgPool2d(2, stride),
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
    )


class BiRealBlock(nn.Module):
    """x + BatchNorm(convolution of sign(x)), without an activation."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, stage: int) -> None:
        super().__init__()
        self.binary_conv = FlatSignConv2d(in_channels, channels, 3, stride, 1, stage=stage)
        self.bn1 = nn.BatchNorm2d(channels)
        self.downsample = _projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn1(self.binary_conv(binarize_activation(x)))
        y += self.downsample(x)
        return y


class ReActBlock(nn.Module):
    """The same with RSign, and with PReLU between two shifts behind the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, stage: int) -> None:
        super().__init__()
        self.move0 = RSign(in_channels)
        self.binary_conv = SignConv2d(in_channels, channels, 3, stride, 1, stage=stage)
        self.bn1 = nn.BatchNorm2d(channels)
        self.move1 = Shift(channels)
        self.prelu = nn.PReLU(channels)
        self.move2 = Shift(channels)
        self.downsample = _projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.binary_conv(self.move0(x)))
        y += self.downsample(x)
        moved: Tensor = self.move2(self.prelu(self.move1(y)))
        return moved


class BiRealNet18(Network):
    """16 blocks of 64 to 512 channels behind a real 3x3 convolution, for small images.

    Args:
        width: channels of the first blocks; the last ones have eight times as many.
    """

    block: type[BiRealBlock] | type[ReActBlock] = BiRealBlock

    def __init__(self, num_classes: int = 10, *, width: int = 64, stage: int = 2) -> None:
        super().__init__()
        self.conv1 = self._first_convolution(width)
        self.bn1 = nn.BatchNorm2d(width)
        in_channels = width
        for index, multiple in enumerate(_MULTIPLES):
            channels = multiple * width
            layer = nn.Sequential()
            for position in range(_BLOCKS):
                stride = 2 if index > 0 and position == 0 else 1
                layer.append(self.block(in_channels, channels, stride, stage=stage))
                in_channels = channels
            self.add_module(f"layer{index + 1}", layer)
        self.fc = nn.Linear(in_channels, num_classes)

    def _first_convolution(self, width: int) -> nn.Conv2d:
        return nn.Conv2d(3, width, 3, padding=1, bias=False)

    def stem(self, x: Tensor) -> Tensor:
        """Return the map in front of the first block."""
        first: Tensor = self.bn1(self.conv1(x))
        return first

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, H, W]."""
        x = self.stem(x)
        for index in range(len(_MULTIPLES)):
            x = self.get_submodule(f"layer{index + 1}")(x)
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class ReActResNet18(BiRealNet18):
    """ReActNet on Bi-Real Net-18, for images of ImageNet's size."""

    input_shape = (3, 224, 224)
    block = ReActBlock

    def __init__(self, num_classes: int = 1000, *, width: int = 64, stage: int = 2) -> None:
        super().__init__(num_classes, width=width, stage=stage)

    def _first_convolution(self, width: int) -> nn.Conv2d:
        return nn.Conv2d(3, width, 7, 2, padding=3, bias=False)

    def stem(self, x: Tensor) -> Tensor:
        """Return the map in front of the first block."""
        return F.max_pool2d(super().stem(x), 3, stride=2, padding=1)
