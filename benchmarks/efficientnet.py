"""EfficientNet-B0 and B3: float alternatives to binary networks.

Written from table 1 of Tan and Le, "EfficientNet", 2019 (arXiv:1905.11946). Its blocks are those of
MobileNetV2 with squeeze-and-excite, whose squeezed channels are a quarter of the block's input.
B3 has 1.2 times the channels, rounded to multiples of 8, and 1.4 times the blocks, rounded up, as
in the paper's TensorFlow code.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

__all__ = ["EfficientNet", "efficientnet_b0", "efficientnet_b3"]

_STEM_CHANNELS, _FEATURES = 32, 1280
# Of the paper's TensorFlow code.
_BATCH_NORM_EPSILON = 1e-3
# Expansion, output channels, blocks, stride of the first block, kernel size.
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


def convolution(
    in_channels: int, channels: int, kernel_size: int, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return a convolution with BatchNorm."""
    padding = kernel_size // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(channels, eps=_BATCH_NORM_EPSILON),
    )


class SqueezeExcite(nn.Module):
    """A scale for each channel, from all channels' means: x * sigmoid(W2 silu(W1 mean(x)))."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.SiLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = x * self.scale(x)
        return scaled


class Block(nn.Module):
    """1x1 to more channels, depthwise, squeeze-and-excite, 1x1 to few; a shortcut if it fits."""

    def __init__(
        self, in_channels: int, channels: int, factor: int, stride: int, size: int
    ) -> None:
        super().__init__()
        wide = factor * in_channels
        self.layers = nn.Sequential()
        if factor != 1:
            self.layers.extend([convolution(in_channels, wide, 1), nn.SiLU()])
        self.layers.extend(
            [
                convolution(wide, wide, size, stride=stride, groups=wide),
                nn.SiLU(),
                SqueezeExcite(wide, in_channels // 4),
                convolution(wide, channels, 1),
            ]
        )
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.has_shortcut else y


class EfficientNet(nn.Module):
    """A stem, seven stages of blocks, and a linear classifier.

    Args:
        width: factor of the channels of B0.
        depth: factor of its blocks.
        num_classes: outputs.
    """

    def __init__(self, width: float = 1.0, depth: float = 1.0, num_classes: int = 1000) -> None:
        super().__init__()
        in_channels, features = scaled(_STEM_CHANNELS, width), scaled(_FEATURES, width)
        self.features = nn.Sequential(convolution(3, in_channels, 3, stride=2), nn.SiLU())
        for factor, narrow, count, stride, size in _STAGES:
            channels = scaled(narrow, width)
            for index in range(math.ceil(depth * count)):
                step = stride if index == 0 else 1
                self.features.append(Block(in_channels, channels, factor, step, size))
                in_channels = channels
        self.features.extend([convolution(in_channels, features, 1), nn.SiLU()])
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, H, W]."""
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def scaled(channels: int, width: float) -> int:
    """Return `width` times the channels, rounded to a multiple of 8 that is not 10 % below."""
    wanted = width * channels
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


def efficientnet_b0() -> EfficientNet:
    """Return the network with untrained weights, in training mode, for images of 224x224."""
    return EfficientNet()


def efficientnet_b3() -> EfficientNet:
    """Return the network with untrained weights, in training mode, for images of 300x300."""
    return EfficientNet(1.2, 1.4)
