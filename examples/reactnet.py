"""Train a network of ReActNet's kind on digits, convert it, compare it, save it.

    python examples/reactnet.py --epochs 8

The layers are plain PyTorch. Nothing in them knows of biper_engine: a sign with a learned threshold
for each channel (RSign), a binary convolution with scaled weights, BatchNorm, a residual, and a
PReLU between two learned shifts (RPReLU). Source: Liu et al., "ReActNet", ECCV 2020. Needs
scikit-learn, for the digits.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import biper_engine


class Sign(torch.autograd.Function):
    """The sign, +1 at 0, with the gradient of Bi-Real Net's polynomial."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (2 - 2 * x.abs()).clamp(min=0)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.weight = nn.Parameter(0.1 * torch.randn(channels, channels, 3, 3))
        self.norm = nn.BatchNorm2d(channels)
        self.before = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.prelu = nn.PReLU(channels)
        self.after = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean((1, 2, 3), keepdim=True).detach()
        bits = Sign.apply(x + self.threshold)
        y = F.conv2d(bits, scale * Sign.apply(self.weight), padding=1)
        return self.prelu(self.norm(y) + x + self.before) + self.after


class Net(nn.Module):
    def __init__(self, channels: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(blocks)))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    steps = epochs * -(-len(images) // 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def main(epochs: int, file: str, images_used: int = 1297) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    test, truth = images[-500:], labels[-500:]

    model = Net()
    train(model, images[:images_used], labels[:images_used], epochs)

    engine = biper_engine.convert(model, test[:1])
    print(engine.report)
    check = biper_engine.verify(engine, model, test)
    print(check.summary())
    assert check.ok

    engine.save(file)
    right = (biper_engine.load(file)(test).argmax(1) == truth).float().mean().item()
    print(f"{right:.1%} of 500 test images are right; saved as {file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--file", default="reactnet.biper")
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.file)
