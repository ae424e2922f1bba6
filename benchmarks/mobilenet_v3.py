"""MobileNetV3-Small and Large of width 1.0: float alternatives to a binary network.

Written from the tables and equations of Howard et al., "Searching for MobileNetV3", 2019
(arXiv:1905.02244): tables 1 and 2, figure 4. As usual in PyTorch, and unlike table 2, the last
convolution of Small has no squeeze-and-excite; squeezed channels are a quarter of the expanded
ones, rounded to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["MobileNetV3", "mobilenet_v3_large", "mobilenet_v3_small"]

_STEM_CHANNELS = 16
# Values of the paper's TensorFlow code, as usual.
_BATCH_NORM_EPSILON = 1e-3


@dataclass(frozen=True)
class Bottleneck:
    """A row of the paper's tables.

    Attributes:
        kernel_size: kernel size of the depthwise convolution.
        expanded: channels of the depthwise convolution.
        channels: output channels of the block.
        squeezes: whether there is squeeze-and-excite.
        activation: h-swish ("HS") or ReLU ("RE").
        stride: stride of the depthwise convolution.
    """

    kernel_size: int
    expanded: int
    channels: int
    squeezes: bool
    activation: str
    stride: int


_LARGE = (
    Bottleneck(3, 16, 16, False, "RE", 1),
    Bottleneck(3, 64, 24, False, "RE", 2),
    Bottleneck(3, 72, 24, False, "RE", 1),
    Bottleneck(5, 72, 40, True, "RE", 2),
    Bottleneck(5, 120, 40, True, "RE", 1),
    Bottleneck(5, 120, 40, True, "RE", 1),
    Bottleneck(3, 240, 80, False, "HS", 2),
    Bottleneck(3, 200, 80, False, "HS", 1),
    Bottleneck(3, 184, 80, False, "HS", 1),
    Bottleneck(3, 184, 80, False, "HS", 1),
    Bottleneck(3, 480, 112, True, "HS", 1),
    Bottleneck(3, 672, 112, True, "HS", 1),
    Bottleneck(5, 672, 160, True, "HS", 2),
    Bottleneck(5, 960, 160, True, "HS", 1),
    Bottleneck(5, 960, 160, True, "HS", 1),
)
_SMALL = (
    Bottleneck(3, 16, 16, True, "RE", 2),
    Bottleneck(3, 72, 24, False, "RE", 2),
    Bottleneck(3, 88, 24, False, "RE", 1),
    Bottleneck(5, 96, 40, True, "HS", 2),
    Bottleneck(5, 240, 40, True, "HS", 1),
    Bottleneck(5, 240, 40, True, "HS", 1),
    Bottleneck(5, 120, 48, True, "HS", 1),
    Bottleneck(5, 144, 48, True, "HS", 1),
    Bottleneck(5, 288, 96, True, "HS", 2),
    Bottleneck(5, 576, 96, True, "HS", 1),
    Bottleneck(5, 576, 96, True, "HS", 1),
)
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"HS": nn.Hardswish, "RE": nn.ReLU}


def multiple_of_8(channels: float) -> int:
    """Return the nearest multiple of 8, at least 8 and at least nine tenths of `channels`."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def convolution(
    in_channels: int,
    channels: int,
    kernel_size: int,
    activation: str | None,
    *,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Return a convolution with BatchNorm and, unless None, an activation."""
    layers = nn.Sequential(
        nn.Conv2d(
            in_channels,
            channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(channels, eps=_BATCH_NORM_EPSILON),
    )
    if activation is not None:
        layers.append(_ACTIVATIONS[activation]())
    return layers


class SqueezeExcite(nn.Module):
    """A scale for each channel, from all channels' means: x * hardsigmoid(W2 relu(W1 mean(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = multiple_of_8(channels / 4)
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = x * self.scale(x)
        return scaled


class InvertedResidual(nn.Module):
    """1x1 to more channels, depthwise, squeeze-and-excite, 1x1 to few; a shortcut if it fits."""

    def __init__(self, in_channels: int, row: Bottleneck) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        if row.expanded != in_channels:
            self.layers.append(convolution(in_channels, row.expanded, 1, row.activation))
        depthwise = convolution(
            row.expanded,
            row.expanded,
            row.kernel_size,
            row.activation,
            stride=row.stride,
            groups=row.expanded,
        )
        self.layers.append(depthwise)
        if row.squeezes:
            self.layers.append(SqueezeExcite(row.expanded))
        self.layers.append(convolution(row.expanded, row.channels, 1, None))
        self.has_shortcut = row.stride == 1 and in_channels == row.channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.has_shortcut else y


class MobileNetV3(nn.Module):
    """A stem, the rows of a table, and a classifier with one hidden layer.

    Args:
        rows: the bottlenecks.
        features: channels of the last convolution.
        hidden: size of the classifier's hidden layer.
        num_classes: number of classes.
    """

    input_shape = (3, 224, 224)

    def __init__(
        self, rows: tuple[Bottleneck, ...], *, features: int, hidden: int, num_classes: int = 1000
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(convolution(3, _STEM_CHANNELS, 3, "HS", stride=2))
        in_channels = _STEM_CHANNELS
        for row in rows:
            self.features.append(InvertedResidual(in_channels, row))
            in_channels = row.channels
        self.features.append(convolution(in_channels, features, 1, "HS"))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(features, hidden),
            nn.Hardswish(),
            nn.Dropout(0.2),
            nn.Linear(hidden, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, 224, 224]."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def mobilenet_v3_small(num_classes: int = 1000) -> MobileNetV3:
    """Return the network of table 2 with fresh weights, in training mode."""
    return MobileNetV3(_SMALL, features=576, hidden=1024, num_classes=num_classes)


def mobilenet_v3_large(num_classes: int = 1000) -> MobileNetV3:
    """Return the network of table 1 with fresh weights, in training mode."""
    return MobileNetV3(_LARGE, features=960, hidden=1280, num_classes=num_classes)
