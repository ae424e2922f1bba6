"""EfficientNet-B0: a float alternative to a binary network.

Written from table 1 of Tan and Le, "EfficientNet", 2019 (arXiv:1905.11946). Its blocks are those of
MobileNetV2 with squeeze-and-excite, whose squeezed channels are a quarter of the block's input.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["EfficientNetB0", "efficientnet_b0"]

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


class EfficientNetB0(nn.Module):
    """A stem, seven stages of blocks, and a linear classifier."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(convolution(3, _STEM_CHANNELS, 3, stride=2), nn.SiLU())
        in_channels = _STEM_CHANNELS
        for factor, channels, count, stride, size in _STAGES:
            for index in range(count):
                step = stride if index == 0 else 1
                self.features.append(Block(in_channels, channels, factor, step, size))
                in_channels = channels
        self.features.extend([convolution(in_channels, _FEATURES, 1), nn.SiLU()])
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(_FEATURES, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, 224, 224]."""
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def efficientnet_b0(num_classes: int = 1000) -> EfficientNetB0:
    """Return the network with fresh weights, in training mode."""
    return EfficientNetB0(num_classes)
