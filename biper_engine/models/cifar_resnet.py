"""The CIFAR ResNets of BiPer, with binary 3x3 convolutions, and ResNet-20 without them.

The first convolution and the classifier stay real. Parameter names and shapes equal those of the
official cifar10/models_cifar/resnet.py (ResNet-20) and resnet2.py (ResNet-18).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.models.network import Network
from biper_engine.nn import BinaryConv2d, BinaryWeightConv2d

__all__ = ["FloatResNet20", "ResNet18", "ResNet20", "ResNet20BinaryWeights"]


class PaddingShortcut(nn.Module):
    """Option A of the ResNet paper: halve the map by averaging, add zero channels on both sides.

    Input channel c lands at channel c + out_channels // 4 if channels are added, else at c.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.padding = 0 if in_channels == out_channels else out_channels // 4

    def forward(self, x: Tensor) -> Tensor:
        halved = F.avg_pool2d(x, 2)
        if not self.padding:
            return halved
        return F.pad(halved, (0, 0, 0, 0, self.padding, self.padding))


class _Block(nn.Module):
    """Two 3x3 convolutions, each with BatchNorm, and the parameters that all blocks share."""

    convolution: Callable[..., nn.Conv2d] = BinaryConv2d
    beta = True  # official checkpoints of networks with binary activations have it

    def __init__(
        self, in_channels: int, channels: int, stride: int, *, frequency: float, stage: int
    ) -> None:
        super().__init__()
        settings: dict[str, Any] = {
            "padding": 1,
            "frequency": frequency,
            "stage": stage,
            "beta": self.beta,
        }
        self.conv1 = self.convolution(in_channels, channels, 3, stride, **settings)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = self.convolution(channels, channels, 3, **settings)
        self.bn2 = nn.BatchNorm2d(channels)
        changes_shape = stride != 1 or in_channels != channels
        self.shortcut = PaddingShortcut(in_channels, channels) if changes_shape else nn.Identity()


class DenseShortcutBlock(_Block):
    """A shortcut around every convolution, as in Bi-Real Net; used by ResNet-20."""

    # Hardtanh in place would copy its input first, as its gradient needs it; that of ReLU doesn't.
    activation: Callable[..., Tensor] = staticmethod(F.hardtanh)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y += self.shortcut(x)
        y = self.activation(y)
        z = self.bn2(self.conv2(y))
        z += y
        return self.activation(z)


class BinaryWeightBlock(DenseShortcutBlock):
    """The same block with real activations, after ReLU: W1A32."""

    convolution = BinaryWeightConv2d
    beta = False
    activation = staticmethod(partial(F.relu, inplace=True))


def _real_convolution(
    in_channels: int, channels: int, kernel_size: int, stride: int = 1, *, padding: int, **_: Any
) -> nn.Conv2d:
    """Take the arguments of `BinaryConv2d`, and use those that concern real weights."""
    return nn.Conv2d(in_channels, channels, kernel_size, stride, padding, bias=False)


class FloatBlock(DenseShortcutBlock):
    """The same block with real weights and real activations, after ReLU."""

    convolution = staticmethod(_real_convolution)
    activation = staticmethod(partial(F.relu, inplace=True))


class BasicBlock(_Block):
    """One shortcut around both convolutions; used by ResNet-18."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardtanh(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.hardtanh(y)


def _layers(
    block: type[_Block],
    widths: Sequence[int],
    blocks_per_layer: int,
    *,
    frequency: float,
    stage: int,
) -> list[nn.Sequential]:
    """One Sequential per width; all but the first halve the map in their first block."""
    layers = []
    in_channels = widths[0]
    for index, channels in enumerate(widths):
        blocks = []
        for position in range(blocks_per_layer):
            stride = 2 if index > 0 and position == 0 else 1
            blocks.append(block(in_channels, channels, stride, frequency=frequency, stage=stage))
            in_channels = channels
        layers.append(nn.Sequential(*blocks))
    return layers


def _initialize(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)


class ResNet20(Network):
    """16, 32 and 64 channels, three blocks each; hardtanh after the first BatchNorm."""

    block: type[DenseShortcutBlock] = DenseShortcutBlock

    def __init__(self, num_classes: int = 10, *, frequency: float = 20.0, stage: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _layers(
            self.block, (16, 32, 64), 3, frequency=frequency, stage=stage
        )
        self.bn2 = nn.BatchNorm1d(64)
        self.linear = nn.Linear(64, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, 32, 32]."""
        x = self.block.activation(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.size(3)).flatten(1)
        logits: Tensor = self.linear(self.bn2(x))
        return logits


class ResNet20BinaryWeights(ResNet20):
    """ResNet-20 with binary weights and real activations, W1A32; ReLU in place of hardtanh."""

    block = BinaryWeightBlock


class FloatResNet20(ResNet20):
    """The float twin of ResNet-20: real weights and activations, ReLU. Both stages are the same."""

    block = FloatBlock

    def __init__(self, num_classes: int = 10, *, stage: int = 2) -> None:
        super().__init__(num_classes, stage=stage)


class ResNet18(Network):
    """Two blocks per width; no hardtanh after the first BatchNorm.

    Args:
        widths: channels of the four layers, the only difference between the official code's A, B,
            C and full width.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        widths: tuple[int, int, int, int] = (64, 128, 256, 512),
        frequency: float = 20.0,
        stage: int = 2,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1, self.layer2, self.layer3, self.layer4 = _layers(
            BasicBlock, widths, 2, frequency=frequency, stage=stage
        )
        self.linear = nn.Linear(widths[-1], num_classes)
        self.bn2 = nn.BatchNorm1d(widths[-1])
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, 32, 32]."""
        x = self.bn1(self.conv1(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = F.avg_pool2d(x, 4).flatten(1)
        logits: Tensor = self.linear(self.bn2(x))
        return logits
