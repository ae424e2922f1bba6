"""BiPer's ten networks and its loss as equations on a state dict, in plain PyTorch.

They follow the paper and the structure of the official code, and share nothing with `biper_engine`:
both surrogates, loss and regulariser are formulas, and autograd derives the gradients with which
the package's backward passes are compared. Training mode only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Equations", "loss"]


def _through(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return exactly `value`, with the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


@dataclass(frozen=True)
class Equations:
    """The layers of one network: tensors by name, w0, and the stage."""

    state: Mapping[str, Tensor]
    frequency: float
    stage: int

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.state

    def count(self, name: str) -> int:
        """Return the number of entries in the sequence `name`."""
        return len({key.split(".")[1] for key in self.state if key.startswith(f"{name}.")})

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], None, stride, padding)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        """(x - mean) / sqrt(variance + 1e-5) * weight + bias, by the batch's statistics.

        PyTorch's own: of integers times alpha, some are the mean itself in exact arithmetic, and
        the sign of the difference is then that of its rounding.
        """
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)

    def binary_weight_conv(
        self, name: str, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1
    ) -> Tensor:
        """(x conv w_q) * alpha, with w_q = sin(w0*w), in stage 2 its sign, straight through."""
        weight = torch.sin(self.frequency * self.state[f"{name}.weight"])
        if self.stage == 2:
            weight = _through(weight.sign(), weight)
        return F.conv2d(x, weight, None, stride, padding, 1, groups) * self.state[f"{name}.alpha"]

    def binary_conv(
        self, name: str, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1
    ) -> Tensor:
        """The same of sign(a / sqrt(var(a) + 1e-5)), with the surrogate of Bi-Real Net.

        The surrogate is a*(2 - |a|) in [-1, 1] and constant outside; its slope is 2 - |2a|.
        """
        scaled = x / torch.sqrt(x.var((1, 2, 3), keepdim=True) + 1e-5)
        clipped = scaled.clamp(-1, 1)
        bits = _through(scaled.sign(), clipped * (2 - clipped.abs()))
        return self.binary_weight_conv(name, bits, stride, padding, groups)

    def logits(self, network: str, images: Tensor) -> Tensor:
        return _NETWORKS[network](self, images)

    def regularizer(self, tau: float) -> Tensor:
        """tau * sum over binary layers of mean(sin(w0*w)^2)."""
        owners = [key.removesuffix(".alpha") for key in self.state if key.endswith(".alpha")]
        waves = [torch.sin(self.frequency * self.state[f"{name}.weight"]) for name in owners]
        return tau * torch.stack([wave.square().mean() for wave in waves]).sum()


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of log(sum(exp(logits))) - logit of the label: cross entropy."""
    right = logits[torch.arange(len(labels)), labels]
    return (torch.logsumexp(logits, 1) - right).mean()


def _option_a(x: Tensor, channels: int) -> Tensor:
    """Halve the map by averages and pad both sides of the channels with a quarter of the new."""
    if x.shape[1] == channels:
        return F.avg_pool2d(x, 2)
    return F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, channels // 4, channels // 4))


def _resnet20(net: Equations, x: Tensor, *, binary_activations: bool) -> Tensor:
    conv = net.binary_conv if binary_activations else net.binary_weight_conv
    activate = F.hardtanh if binary_activations else F.relu
    x = activate(net.norm("bn1", net.conv("conv1", x, padding=1)))
    for layer in ("layer1", "layer2", "layer3"):
        for index in range(3):
            block = f"{layer}.{index}"
            stride = 2 if layer != "layer1" and index == 0 else 1
            channels = len(net.state[f"{block}.conv1.weight"])
            shortcut = _option_a(x, channels) if stride == 2 else x
            x = activate(net.norm(f"{block}.bn1", conv(f"{block}.conv1", x, stride, 1)) + shortcut)
            x = activate(net.norm(f"{block}.bn2", conv(f"{block}.conv2", x, 1, 1)) + x)
    return net.linear("linear", net.norm("bn2", x.mean((2, 3))))


def _resnet18(net: Equations, x: Tensor) -> Tensor:
    x = net.norm("bn1", net.conv("conv1", x, padding=1))
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        for index in range(2):
            block = f"{layer}.{index}"
            stride = 2 if layer != "layer1" and index == 0 else 1
            channels = len(net.state[f"{block}.conv1.weight"])
            shortcut = _option_a(x, channels) if stride == 2 else x
            y = F.hardtanh(
                net.norm(f"{block}.bn1", net.binary_conv(f"{block}.conv1", x, stride, 1))
            )
            y = net.norm(f"{block}.bn2", net.binary_conv(f"{block}.conv2", y, 1, 1))
            x = F.hardtanh(y + shortcut)
    return net.linear("linear", net.norm("bn2", F.avg_pool2d(x, 4).flatten(1)))


def _vgg_small(net: Equations, x: Tensor) -> Tensor:
    x = F.hardtanh(net.norm("bn0", net.conv("conv0", x, padding=1)))
    for index in range(1, 6):
        x = net.binary_conv(f"conv{index}", x, 1, 1)
        if index % 2 == 1:
            x = F.max_pool2d(x, 2)
        x = F.hardtanh(net.norm(f"bn{index}", x))
    return net.linear("fc", x.flatten(1))


def _imagenet_resnet(net: Equations, x: Tensor) -> Tensor:
    x = F.hardtanh(net.norm("bn1", net.conv("conv1", x, stride=2, padding=3)))
    x = F.max_pool2d(x, 3, 2, 1)
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        for index in range(net.count(layer)):
            block = f"{layer}.{index}"
            stride = 2 if layer != "layer1" and index == 0 else 1
            shortcut = x
            if net.has(f"{block}.downsample.0"):
                shortcut = net.norm(
                    f"{block}.downsample.1", net.conv(f"{block}.downsample.0", x, stride)
                )
            y = net.binary_conv(f"{block}.conv1", x, stride, 1)
            x = F.hardtanh(net.norm(f"{block}.bn1", y) + shortcut)
            y = net.binary_conv(f"{block}.conv2", x, 1, 1)
            x = F.hardtanh(net.norm(f"{block}.bn2", y) + x)
    return net.linear("fc", net.norm("bn2", x.mean((2, 3))))


def _mobilenet(net: Equations, x: Tensor) -> Tensor:
    x = F.hardtanh(net.norm("model.0.1", net.conv("model.0.0", x, stride=2, padding=1)))
    for index in range(1, 14):
        block = f"model.{index}"
        stride = 2 if index in (2, 4, 6, 12) else 1
        shortcut = x
        if stride == 2:
            shortcut = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        y = net.binary_conv(f"{block}.conv1", x, stride, 1, groups=x.shape[1] // 16)
        x = F.hardtanh(net.norm(f"{block}.bn1", y) + shortcut)
        x = F.hardtanh(net.norm(f"{block}.bn2", net.binary_conv(f"{block}.conv2", x)))
        x = F.hardtanh(net.norm(f"{block}.bn3", net.binary_conv(f"{block}.conv3", x)) + x)
    return net.linear("fc", x.mean((2, 3)))


_NETWORKS: dict[str, Callable[[Equations, Tensor], Tensor]] = {
    "cifar10/resnet20_1w1a": partial(_resnet20, binary_activations=True),
    "cifar10/resnet20_1w32a": partial(_resnet20, binary_activations=False),
    "cifar10/resnet18_1w1a": _resnet18,
    "cifar10/resnet18A_1w1a": _resnet18,
    "cifar10/resnet18B_1w1a": _resnet18,
    "cifar10/resnet18C_1w1a": _resnet18,
    "cifar10/vgg_small_1w1a": _vgg_small,
    "imagenet/resnet18_1w1a": _imagenet_resnet,
    "imagenet/resnet34_1w1a": _imagenet_resnet,
    "imagenet/mobilenet_1w1a": _mobilenet,
}
