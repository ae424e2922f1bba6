"""Binary networks as other people write them; nothing here uses biper_engine.

`SIGNS` and `WEIGHTS` are forms found in public code. Every class is small (8x8 images) and draws
its weights and BatchNorm statistics from the global generator: see `seeded`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a model with fixed random weights and lived-in BatchNorm layers, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.track_running_stats:
                lived_in(module)
    return model.eval()


def lived_in(norm: nn.Module) -> None:
    """Give a BatchNorm statistics and parameters of a trained one: about a third negative."""
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 1.5)
        if norm.affine:
            sign = torch.where(torch.rand_like(norm.weight) < 0.3, -1.0, 1.0)
            norm.weight.copy_(torch.empty_like(norm.weight).uniform_(0.5, 1.5) * sign)
            norm.bias.normal_(0, 0.2)


# -- ways to write a sign -------------------------------------------------------------------------


class SignFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


class NoZeroFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_non_differentiable()
        y = torch.sign(x)
        y[y == 0] = 1
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def where_ge(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def where_ge_tensors(x: Tensor) -> Tensor:
    return torch.where(x >= 0, torch.ones_like(x), -torch.ones_like(x))


def where_ge_integers(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1, -1).to(x.dtype)


def where_gt(x: Tensor) -> Tensor:
    return torch.where(x > 0, torch.tensor(1.0, dtype=x.dtype), torch.tensor(-1.0, dtype=x.dtype))


def where_lt(x: Tensor) -> Tensor:
    return torch.where(x < 0, -torch.ones_like(x), torch.ones_like(x))


def arithmetic(x: Tensor) -> Tensor:
    return 2 * (x >= 0).to(x.dtype) - 1


def arithmetic_gt(x: Tensor) -> Tensor:
    return (x > 0).type_as(x).mul(2).sub(1)


def bool_difference(x: Tensor) -> Tensor:
    return (x >= 0).type(x.dtype) - (x < 0).type(x.dtype)


def copysign(x: Tensor) -> Tensor:
    return torch.copysign(torch.ones_like(x), x)


def masked_write(x: Tensor) -> Tensor:
    y = torch.sign(x)
    y[y == 0] = 1
    return y


def masked_write_input(x: Tensor) -> Tensor:
    y = torch.sign(x)
    y[x == 0] = 1.0
    return y


def masked_fill(x: Tensor) -> Tensor:
    return x.sign().masked_fill(x == 0, -1)


def data_assignment(x: Tensor) -> Tensor:
    y = x.clone()
    y.data = torch.sign(y.data)
    return y


def data_in_place(x: Tensor) -> Tensor:
    y = x + 0
    y.data.sign_()
    return y


def sign_nudged(x: Tensor) -> Tensor:
    return torch.sign(torch.sign(x) + 0.1)


def straight_through(x: Tensor) -> Tensor:
    c = torch.clamp(x, -1, 1)
    return torch.sign(x).detach() - c.detach() + c


def straight_through_reversed(x: Tensor) -> Tensor:
    return x + (where_ge(x).to(x.dtype) - x).detach()


def bireal(x: Tensor) -> Tensor:
    forward = torch.sign(x)
    mask1, mask2, mask3 = x < -1, x < 0, x < 1
    out1 = (-1) * mask1.type(x.dtype) + (x * x + 2 * x) * (1 - mask1.type(x.dtype))
    out2 = out1 * mask2.type(x.dtype) + (-x * x + 2 * x) * (1 - mask2.type(x.dtype))
    out3 = out2 * mask3.type(x.dtype) + 1 * (1 - mask3.type(x.dtype))
    return forward.detach() - out3.detach() + out3


def heaviside(x: Tensor) -> Tensor:
    return torch.heaviside(x, torch.ones((), dtype=x.dtype)) * 2 - 1


def hardtanh_rounded(x: Tensor) -> Tensor:
    """The stochastic-free Binarize of BinaryNet code: ((x + 1) / 2).clamp(0, 1).round() * 2 - 1."""
    return (x > 0).to(x.dtype).add_(-0.5).mul_(2)


SIGNS: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": torch.sign,
    "function": SignFunction.apply,
    "function_no_zero": NoZeroFunction.apply,
    "where_ge": where_ge,
    "where_ge_tensors": where_ge_tensors,
    "where_ge_integers": where_ge_integers,
    "where_gt": where_gt,
    "where_lt": where_lt,
    "arithmetic": arithmetic,
    "arithmetic_gt": arithmetic_gt,
    "bool_difference": bool_difference,
    "copysign": copysign,
    "masked_write": masked_write,
    "masked_write_input": masked_write_input,
    "masked_fill": masked_fill,
    "data_assignment": data_assignment,
    "data_in_place": data_in_place,
    "sign_nudged": sign_nudged,
    "straight_through": straight_through,
    "straight_through_reversed": straight_through_reversed,
    "bireal": bireal,
    "heaviside": heaviside,
    "hardtanh_rounded": hardtanh_rounded,
}


# -- ways to write binary weights -----------------------------------------------------------------


def plain_weight(w: Tensor) -> Tensor:
    return torch.sign(w)


def bwn_weight(w: Tensor) -> Tensor:
    """XNOR-Net: mean |w| of each filter times the sign."""
    return w.abs().mean((1, 2, 3), keepdim=True) * torch.sign(w)


def item_weight(w: Tensor) -> Tensor:
    """One scale for the layer, read out as a Python number."""
    return torch.sign(w) * w.abs().mean().item()


def irnet_weight(w: Tensor) -> Tensor:
    """IR-Net: standardise, binarise, scale by a power of two."""
    bw = w - w.view(w.size(0), -1).mean(-1).view(w.size(0), 1, 1, 1)
    bw = bw / bw.view(bw.size(0), -1).std(-1).view(bw.size(0), 1, 1, 1)
    power = (
        torch.log(bw.abs().view(bw.size(0), -1).mean(-1)) / torch.log(torch.tensor(2.0))
    ).round()
    return torch.sign(bw) * torch.pow(2.0, power).view(bw.size(0), 1, 1, 1).to(w.dtype)


def reactnet_weight(w: Tensor) -> Tensor:
    scale = w.abs().mean(3, keepdim=True).mean(2, keepdim=True).mean(1, keepdim=True).detach()
    no_grad = scale * torch.sign(w)
    clipped = torch.clamp(w, -1.0, 1.0)
    return no_grad.detach() - clipped.detach() + clipped


def shifted_weight(w: Tensor) -> Tensor:
    """Two values beta +- alpha that are no negatives of each other."""
    return 0.25 + 0.5 * torch.sign(w)


def zero_one_weight(w: Tensor) -> Tensor:
    return (w >= 0).to(w.dtype)


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": plain_weight,
    "bwn": bwn_weight,
    "item": item_weight,
    "irnet": irnet_weight,
    "reactnet": reactnet_weight,
    "shifted": shifted_weight,
    "zero_one": zero_one_weight,
}


# -- small networks -------------------------------------------------------------------------------


class QConv(nn.Conv2d):
    """A convolution with any binariser of inputs and of weights."""

    def __init__(
        self,
        *args: Any,
        sign: Callable[[Tensor], Tensor] = torch.sign,
        binarize: Callable[[Tensor], Tensor] = plain_weight,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **{"bias": False, **kwargs})
        self.sign, self.binarize = sign, binarize

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.sign(x), self.binarize(self.weight), self.bias)


class Probe(nn.Module):
    """One binary convolution on the network's own input, so that the input decides every sign."""

    def __init__(self, sign: Callable[[Tensor], Tensor], channels: int = 5, **kwargs: Any) -> None:
        super().__init__()
        self.conv = QConv(channels, 7, 3, padding=1, sign=sign, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SmallNet(nn.Module):
    """Stem, three binary convolutions with shortcuts, average pool, classifier; all in place."""

    def __init__(
        self,
        sign: Callable[[Tensor], Tensor] = torch.sign,
        binarize: Callable[[Tensor], Tensor] = plain_weight,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(8)
        options = {"sign": sign, "binarize": binarize, "padding": 1}
        self.conv1 = QConv(8, 8, 3, **options)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = QConv(8, 16, 3, stride=2, **options)
        self.norm2 = nn.BatchNorm2d(16)
        self.conv3 = QConv(16, 16, 3, **options)
        self.norm3 = nn.BatchNorm2d(16)
        self.shortcut = Lambda(
            lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)
        )
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.norm0(self.stem(x)), inplace=True)
        out = self.norm1(self.conv1(x))
        out += x
        x = F.hardtanh(out, inplace=True)
        out = self.norm2(self.conv2(x))
        out += self.shortcut(x)
        x = F.hardtanh(out, inplace=True)
        x = F.hardtanh(self.norm3(self.conv3(x)), inplace=True)
        x = F.avg_pool2d(x, x.size(3))
        return self.fc(x.view(x.size(0), -1))


class PlainNet(nn.Module):
    """Stem, one binary convolution, classifier: a third of the work of `SmallNet`."""

    def __init__(
        self,
        sign: Callable[[Tensor], Tensor] = torch.sign,
        binarize: Callable[[Tensor], Tensor] = plain_weight,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(8)
        self.conv1 = QConv(8, 16, 3, sign=sign, binarize=binarize)
        self.norm1 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(F.hardtanh(self.norm0(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class BufferBranch(nn.Module):
    """Chooses its path by a buffer's value, and its scale by a statistic of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stage", torch.tensor(2))
        self.conv = nn.Conv2d(4, 6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        w = torch.sign(self.conv.weight) if self.stage.item() == 2 else self.conv.weight
        if self.conv.weight.abs().mean() > 1e6:
            x = x * 2
        return F.conv2d(torch.sign(x), w) * self.conv.weight.abs().mean().item()


class BinaryNetConv(nn.Conv2d):
    """The layer of the classic BinaryNet code: overwrites its own weight at every call."""

    def forward(self, x: Tensor) -> Tensor:
        x.data = x.data.sign()
        if not hasattr(self.weight, "org"):
            self.weight.org = self.weight.data.clone()
        self.weight.data = self.weight.org.sign()
        out = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        if self.bias is not None:
            self.bias.org = self.bias.data.clone()
            out += self.bias.view(1, -1, 1, 1).expand_as(out)
        return out


class BinaryNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Hardtanh(inplace=True),
            BinaryNetConv(8, 8, 3, padding=1, bias=True),
            nn.MaxPool2d(2, 2),
            nn.BatchNorm2d(8),
            nn.Hardtanh(inplace=True),
            BinaryNetConv(8, 16, 3, padding=1, bias=True),
            nn.BatchNorm2d(16),
            nn.Hardtanh(inplace=True),
        )
        self.classifier = nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(-1, 16 * 4 * 4))


class LearnableBias(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, channels, 1, 1) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.expand_as(x)


class ReActBlock(nn.Module):
    """ReActNet-A: 3x3 then pointwise, RSign and RPReLU, duplicated and concatenated to widen."""

    def __init__(self, channels: int, wider: bool, stride: int) -> None:
        super().__init__()
        self.wider, self.stride = wider, stride
        self.move11 = LearnableBias(channels)
        self.conv3x3 = QConv(
            channels, channels, 3, stride=stride, padding=1, sign=bireal, binarize=reactnet_weight
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.move12, self.move13 = LearnableBias(channels), LearnableBias(channels)
        self.prelu1 = nn.PReLU(channels)
        self.move21 = LearnableBias(channels)
        pointwise = {"sign": bireal, "binarize": reactnet_weight}
        self.pw1 = QConv(channels, channels, 1, **pointwise)
        self.norm1 = nn.BatchNorm2d(channels)
        if wider:
            self.pw2 = QConv(channels, channels, 1, **pointwise)
            self.norm2 = nn.BatchNorm2d(channels)
        out = channels * (2 if wider else 1)
        self.move22, self.move23 = LearnableBias(out), LearnableBias(out)
        self.prelu2 = nn.PReLU(out)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv3x3(self.move11(x)))
        x = F.avg_pool2d(x, 2, 2) if self.stride == 2 else x
        y = self.move13(self.prelu1(self.move12(x + out)))
        z = self.move21(y)
        if not self.wider:
            out = self.norm1(self.pw1(z)) + y
        else:
            out = torch.cat([self.norm1(self.pw1(z)) + y, self.norm2(self.pw2(z)) + y], dim=1)
        return self.move23(self.prelu2(self.move22(out)))


class ReActNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.blocks = nn.Sequential(ReActBlock(8, False, 1), ReActBlock(8, True, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)
        for module in self.modules():
            if isinstance(module, nn.PReLU):
                nn.init.uniform_(module.weight, -0.4, 0.6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(self.stem(x)))
        return self.fc(x.view(x.size(0), -1))


class BiRealBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = QConv(
            inputs, outputs, 3, stride=stride, padding=1, sign=bireal, binarize=reactnet_weight
        )
        self.bn = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(2, stride),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn(self.conv(x))
        out += shortcut
        return out


class BiRealNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer = nn.Sequential(
            BiRealBlock(8, 8, 1), BiRealBlock(8, 16, 2), BiRealBlock(16, 16, 1)
        )
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.maxpool(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class XNORBlock(nn.Module):
    """XNOR-Net: BatchNorm, sign, convolution with bias, ReLU."""

    def __init__(self, inputs: int, outputs: int, groups: int = 1) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs, eps=1e-4, momentum=0.1, affine=True)
        self.conv = QConv(
            inputs, outputs, 3, padding=1, groups=groups, bias=True, sign=SignFunction.apply,
            binarize=bwn_weight,
        )  # fmt: skip
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(self.bn(x)))


class XNORNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.blocks = nn.Sequential(
            XNORBlock(8, 16), nn.MaxPool2d(2), XNORBlock(16, 16, groups=2), nn.MaxPool2d(3, 2, 1)
        )
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(16 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.first(x))
        return self.last(self.dropout(x.reshape(x.size(0), -1)))


class QLinear(nn.Linear):
    def __init__(self, *args: Any, sign: Callable[[Tensor], Tensor] | None = torch.sign, **kw: Any):
        super().__init__(*args, **{"bias": False, **kw})
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.sign is None else self.sign(x)
        return F.linear(x, torch.sign(self.weight), self.bias)


class BinaryMLP(nn.Module):
    """Flattens images, then binary layers to the very end: the classifier is binary, too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = QLinear(3 * 8 * 8, 40)
        self.bn1 = nn.BatchNorm1d(40)
        self.fc2 = QLinear(40, 33, bias=True)
        self.bn2 = nn.BatchNorm1d(33)
        self.fc3 = QLinear(33, 10)
        self.bn3 = nn.BatchNorm1d(10, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3 * 8 * 8)
        x = F.hardtanh(self.bn1(self.fc1(x)))
        x = F.hardtanh(self.bn2(self.fc2(x)))
        return self.bn3(self.fc3(x))


class Flattened(nn.Module):
    """Sign, then flatten, then a binary linear layer: a convolution by the whole map."""

    def __init__(self, sign_first: bool) -> None:
        super().__init__()
        self.sign_first = sign_first
        self.conv = QConv(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.fc = QLinear(6 * 16, 10, sign=None)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.bn(self.conv(x)), 2)
        x = torch.sign(x).flatten(1) if self.sign_first else torch.sign(x.flatten(1))
        return self.fc(x)
