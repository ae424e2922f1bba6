"""Train a small detector with a binary backbone, and convert the backbone in place.

    python examples/detector.py --steps 300

The detector finds one bright square in a noisy image: for each cell of an 8x8 grid, the head says
how likely it has the centre of the square, and how far away its edges are. The head stays float,
and the code around the backbone is the same before and after; only `detector.backbone` is replaced
by an engine.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biper_engine
from biper_engine.nn import RSign, SignConv2d

SIZE, CELLS = 64, 8
STEP = SIZE // CELLS


class BinaryBlock(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.sign = RSign(channels)
        self.conv = SignConv2d(channels, channels, 3, stride, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        same = x if self.stride == 1 else F.avg_pool2d(x, 2)
        return self.norm(self.conv(self.sign(x))) + same


class Backbone(nn.Module):
    """Feature maps of two scales, 16x16 and 8x8 cells."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 5, 4, padding=2), nn.BatchNorm2d(channels))
        self.fine = BinaryBlock(channels, 1)
        self.coarse = nn.Sequential(BinaryBlock(channels, 2), BinaryBlock(channels, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.fine(self.stem(images))
        return [fine, self.coarse(fine)]


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Conv2d(128, 5, 1)  # score, distances to the left, top, right, bottom

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [N, 64] and boxes [N, 64, 4] as x1, y1, x2, y2 in pixels."""
        fine, coarse = self.backbone(images)
        out = self.head(torch.cat([F.avg_pool2d(fine, 2), coarse], 1)).flatten(2).transpose(1, 2)
        centre = STEP * (torch.arange(CELLS) + 0.5)
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        middle = torch.stack([x, y], -1).view(1, -1, 2)
        sides = STEP * F.softplus(out[..., 1:])
        return out[..., 0], torch.cat([middle - sides[..., :2], middle + sides[..., 2:]], 2)


def squares(count: int) -> tuple[Tensor, Tensor]:
    """Return noisy images with a bright square each, and its box."""
    side = torch.randint(12, 28, (count, 1))
    corner = (torch.rand(count, 2) * (SIZE - side)).long()
    boxes = torch.cat([corner, corner + side], 1)
    at = torch.arange(SIZE)
    inside = [(at >= boxes[:, i, None]) & (at < boxes[:, i + 2, None]) for i in (0, 1)]
    images = (inside[1][:, :, None] & inside[0][:, None, :]).float()
    return (images + 0.3 * torch.randn(count, SIZE, SIZE))[:, None], boxes.float()


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Return the intersection over the union of boxes [N, 4]."""
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    both = sides.prod(1)
    return both / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - both)


def best(detector: Detector, images: Tensor) -> Tensor:
    """Return the box of the cell with the highest score, for each image."""
    with torch.no_grad():
        scores, boxes = detector(images)
    return boxes[torch.arange(len(images)), scores.argmax(1)]


def train(detector: Detector, steps: int) -> None:
    optimizer = torch.optim.Adam(detector.parameters(), lr=3e-3)
    detector.train()
    for _ in range(steps):
        images, truth = squares(32)
        cell = ((truth[:, :2] + truth[:, 2:]) / 2 // STEP).long()
        cell = cell[:, 1] * CELLS + cell[:, 0]
        scores, boxes = detector(images)
        found = boxes[torch.arange(len(images)), cell]
        loss = F.cross_entropy(scores, cell) + F.smooth_l1_loss(found, truth) / STEP
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    detector.eval()


def main(steps: int) -> None:
    torch.manual_seed(0)
    detector = Detector()
    train(detector, steps)
    images, truth = squares(256)
    before = best(detector, images)

    backbone = detector.backbone
    engine = biper_engine.convert(backbone, images[:1])
    print(engine.report)
    check = biper_engine.verify(engine, backbone, images)
    print(check.summary())
    assert check.ok

    detector.backbone = engine
    after = best(detector, images)
    print(f"overlap with the true box: {overlap(before, truth).mean():.3f} in float, ", end="")
    print(f"{overlap(after, truth).mean():.3f} with the engine")
    print(f"largest change of an edge: {(after - before).abs().max():.2g} pixels")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
