"""ResNet-50: a float alternative to a binary network.

Written from table 1 and figure 5 of He et al., "Deep Residual Learning for Image Recognition", 2015
(arXiv:1512.03385). As usual in PyTorch, the 3x3 convolution of a block has its stride.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ResNet50", "resnet50"]

# Channels of the 3x3 convolutions, blocks, stride of the first block.
_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
_EXPANSION = 4


def convolution(in_channels: int, channels: int, size: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(channels),
    )


class Bottleneck(nn.Module):
    """1x1 to few channels, 3x3, 1x1 to four times as many, and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = _EXPANSION * channels
        self.layers = nn.Sequential(
            convolution(in_channels, channels, 1),
            nn.ReLU(),
            convolution(channels, channels, 3, stride),
            nn.ReLU(),
            convolution(channels, out_channels, 1),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1 and in_channels == out_channels
            else convolution(in_channels, out_channels, 1, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """A stem with a max pool, four stages of blocks, and a linear classifier."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(
            convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)
        )
        in_channels = 64
        for channels, count, stride in _STAGES:
            for index in range(count):
                step = stride if index == 0 else 1
                self.features.append(Bottleneck(in_channels, channels, step))
                in_channels = _EXPANSION * channels
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, 224, 224]."""
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def resnet50(num_classes: int = 1000) -> ResNet50:
    """Return the network with fresh weights, in training mode."""
    return ResNet50(num_classes)
