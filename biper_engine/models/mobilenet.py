"""The binary MobileNetV1 of BiPer: 3x3 convolutions in groups of 16 channels, then two 1x1 ones.

The stem and the classifier stay real. Parameter names and shapes equal those of the official
imagenet/models_imagenet/mobilenet.py.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.models.network import Network
from biper_engine.nn import BinaryConv2d

__all__ = ["MobileNet"]

_GROUP_CHANNELS = 16
# (output channels, stride) of each block.
_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)


class SeparableBlock(nn.Module):
    """Grouped 3x3, 1x1, 1x1: each binary, with BatchNorm and hardtanh; shortcuts skip 1 and 3."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, *, frequency: float, stage: int
    ) -> None:
        super().__init__()
        self.conv1 = BinaryConv2d(
            in_channels,
            in_channels,
            3,
            stride,
            padding=1,
            groups=in_channels // _GROUP_CHANNELS,
            frequency=frequency,
            stage=stage,
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = BinaryConv2d(in_channels, channels, 1, frequency=frequency, stage=stage)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = BinaryConv2d(channels, channels, 1, frequency=frequency, stage=stage)
        self.bn3 = nn.BatchNorm2d(channels)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        # The last windows of a map of odd size have fewer pixels; their mean is over those only.
        y += x if self.stride == 1 else F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        y = F.hardtanh(y)
        y = F.hardtanh(self.bn2(self.conv2(y)))
        z = self.bn3(self.conv3(y))
        z += y
        return F.hardtanh(z)


class MobileNet(Network):
    """13 blocks from 32 to 1024 channels behind a real 3x3 convolution of stride 2."""

    input_shape = (3, 224, 224)

    def __init__(self, num_classes: int = 1000, *, frequency: float = 20.0, stage: int = 2) -> None:
        super().__init__()
        in_channels = 32
        stem = nn.Sequential(
            nn.Conv2d(3, in_channels, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.Hardtanh(),
        )
        self.model = nn.Sequential(stem)
        for channels, stride in _BLOCKS:
            self.model.append(
                SeparableBlock(in_channels, channels, stride, frequency=frequency, stage=stage)
            )
            in_channels = channels
        self.model.append(nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, 224, 224]."""
        logits: Tensor = self.fc(self.model(x).flatten(1))
        return logits
