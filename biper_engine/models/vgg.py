"""VGG-Small of BiPer: one real and five binary convolutions, a real classifier.

Parameter names and shapes equal those of the official cifar10/models_cifar/vgg.py.
"""

from __future__ import annotations

from math import sqrt

from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.models.network import Network
from biper_engine.nn import BinaryConv2d

__all__ = ["VGGSmall"]


class VGGSmall(Network):
    """128-256-512 channels; after each convolution a pool (every second), BatchNorm, hardtanh."""

    def __init__(self, num_classes: int = 10, *, frequency: float = 20.0, stage: int = 2) -> None:
        super().__init__()

        def binary(in_channels: int, out_channels: int) -> BinaryConv2d:
            return BinaryConv2d(
                in_channels, out_channels, 3, padding=1, frequency=frequency, stage=stage, beta=True
            )

        self.conv0 = nn.Conv2d(3, 128, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(128)
        self.conv1 = binary(128, 128)
        self.bn1 = nn.BatchNorm2d(128)
        self.conv2 = binary(128, 256)
        self.bn2 = nn.BatchNorm2d(256)
        self.conv3 = binary(256, 256)
        self.bn3 = nn.BatchNorm2d(256)
        self.conv4 = binary(256, 512)
        self.bn4 = nn.BatchNorm2d(512)
        self.conv5 = binary(512, 512)
        self.bn5 = nn.BatchNorm2d(512)
        self.fc = nn.Linear(512 * 4 * 4, num_classes)
        self._initialize()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, 32, 32]."""
        x = F.hardtanh(self.bn0(self.conv0(x)))
        x = F.hardtanh(self.bn1(F.max_pool2d(self.conv1(x), 2)))
        x = F.hardtanh(self.bn2(self.conv2(x)))
        x = F.hardtanh(self.bn3(F.max_pool2d(self.conv3(x), 2)))
        x = F.hardtanh(self.bn4(self.conv4(x)))
        x = F.hardtanh(self.bn5(F.max_pool2d(self.conv5(x), 2)))
        logits: Tensor = self.fc(x.flatten(1))
        return logits

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                height, width = module.kernel_size
                nn.init.normal_(module.weight, 0, sqrt(2 / (height * width * module.out_channels)))
        nn.init.normal_(self.fc.weight, 0, 0.01)
        nn.init.zeros_(self.fc.bias)
