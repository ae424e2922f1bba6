"""The ImageNet ResNets of BiPer: a shortcut around every binary 3x3 convolution.

The 7x7 stem, the 1x1 convolutions of the shortcuts that halve the map, and the classifier stay
real. Parameter names and shapes equal those of the official imagenet/models_imagenet/resnet.py.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.models.network import Network
from biper_engine.nn import BinaryConv2d

__all__ = ["ImageNetResNet"]

_WIDTHS = (64, 128, 256, 512)
# The official initial weight of every BatchNorm2d: shortcuts carry all of the signal at first.
_FIRST_SCALE = 1e-8


class ProjectionShortcutBlock(nn.Module):
    """Two binary 3x3 convolutions, each with BatchNorm, its own shortcut, and hardtanh."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, *, frequency: float, stage: int
    ) -> None:
        super().__init__()
        self.conv1 = BinaryConv2d(
            in_channels, channels, 3, stride, padding=1, frequency=frequency, stage=stage
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = BinaryConv2d(
            channels, channels, 3, padding=1, frequency=frequency, stage=stage
        )
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y += self.downsample(x)
        y = F.hardtanh(y)
        z = self.bn2(self.conv2(y))
        z += y
        return F.hardtanh(z)


class ImageNetResNet(Network):
    """ResNet-18 with two blocks in each layer, ResNet-34 with 3, 4, 6 and 3.

    Args:
        blocks: number of blocks of 64, 128, 256 and 512 channels.
    """

    input_shape = (3, 224, 224)

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        blocks: tuple[int, int, int, int] = (2, 2, 2, 2),
        frequency: float = 20.0,
        stage: int = 2,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        in_channels = _WIDTHS[0]
        for index, (channels, count) in enumerate(zip(_WIDTHS, blocks, strict=True)):
            layer = nn.Sequential()
            for position in range(count):
                stride = 2 if index > 0 and position == 0 else 1
                layer.append(
                    ProjectionShortcutBlock(
                        in_channels, channels, stride, frequency=frequency, stage=stage
                    )
                )
                in_channels = channels
            self.add_module(f"layer{index + 1}", layer)
        self.bn2 = nn.BatchNorm1d(512)
        self.fc = nn.Linear(512, num_classes)
        self._initialize()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, 224, 224]."""
        x = F.hardtanh(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for index in range(len(_WIDTHS)):
            x = self.get_submodule(f"layer{index + 1}")(x)
        x = F.avg_pool2d(x, 7, stride=1).flatten(1)
        logits: Tensor = self.fc(self.bn2(x))
        return logits

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, _FIRST_SCALE)
