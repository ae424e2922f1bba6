"""Compare single binary convolutions with PyTorch's float convolution of the same shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from biper_engine import ops
from biper_engine.geometry import Conv2dGeometry
from biper_engine.ops.backends import select
from biper_engine.ops.cpu_program import CpuProgram

__all__ = ["RESNET18_LAYERS", "ConvShape", "LayerWork", "network_work"]


@dataclass(frozen=True, kw_only=True)
class ConvShape:
    """A 3x3 convolution of a network, padded by 1.

    Attributes:
        in_channels, out_channels: channels.
        size: height and width of the input.
        stride: in both directions.
        count: how often the network has it.
    """

    in_channels: int
    out_channels: int
    size: int
    stride: int = 1
    count: int = 1

    @property
    def name(self) -> str:
        """Such as "64@56", or "64>128@56/2" with a stride."""
        if self.stride == 1:
            return f"{self.in_channels}@{self.size}"
        return f"{self.in_channels}>{self.out_channels}@{self.size}/{self.stride}"

    @property
    def geometry(self) -> Conv2dGeometry:
        """The convolution without the image size."""
        return Conv2dGeometry(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            kernel_size=(3, 3),
            stride=(self.stride, self.stride),
            padding=(1, 1, 1, 1),
        )

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image, including padded taps."""
        return self.geometry.macs(self.size, self.size)


RESNET18_LAYERS = (
    ConvShape(in_channels=64, out_channels=64, size=56, count=4),
    ConvShape(in_channels=64, out_channels=128, size=56, stride=2),
    ConvShape(in_channels=128, out_channels=128, size=28, count=3),
    ConvShape(in_channels=128, out_channels=256, size=28, stride=2),
    ConvShape(in_channels=256, out_channels=256, size=14, count=3),
    ConvShape(in_channels=256, out_channels=512, size=14, stride=2),
    ConvShape(in_channels=512, out_channels=512, size=7, count=3),
)
"""The binary convolutions of an ImageNet ResNet-18 for 224x224 images."""


class LayerWork:
    """One convolution, ready to run on bits with all that follows it, and in float by itself.

    On bits: the convolution, BatchNorm as scale and bias, the residual, clamp(-1, 1), the float map
    for the next residual and the bits for the next layer. In float: `F.conv2d` and nothing else.

    Args:
        shape: the convolution.
        batch: images.

    Raises:
        ValueError: an accumulator differs between the two.
    """

    def __init__(self, shape: ConvShape, batch: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        geometry, channels = shape.geometry, shape.out_channels
        images = (batch, shape.in_channels, shape.size, shape.size)
        signs = torch.randint(0, 2, images, generator=generator).float() * 2 - 1
        weight = torch.randint(0, 2, (channels, shape.in_channels, 3, 3), generator=generator)
        weight = weight.float() * 2 - 1
        self.shape = shape
        self._signs = signs.contiguous(memory_format=torch.channels_last)
        self._weight = weight.contiguous(memory_format=torch.channels_last)
        self._bits = ops.binarize(signs)
        packed = ops.binarize(weight)  # [O, 3, 3, words]: the canonical layout is that of maps
        size = geometry.output_size(shape.size, shape.size)
        residual = torch.randn((batch, channels, *size), generator=generator)
        self._residual = residual.contiguous(memory_format=torch.channels_last)
        backend = select("bconv2d_float_bits", geometry, torch.device("cpu"))
        self.backend = backend.name
        epilogue = ops.Epilogue(
            multiplier=torch.rand(channels, generator=generator) * 0.02,
            bias=torch.randn(channels, generator=generator),
            clamp_min=-1.0,
            clamp_max=1.0,
            threshold=torch.zeros(channels),
            sense=torch.zeros(channels, dtype=torch.bool),
        )
        prepacked = ops.prepack(packed, geometry, backend.name)
        self._fused = backend.bind_fused(geometry, epilogue, prepacked, torch.float32, True)
        self._epilogue, self._packed = epilogue, packed
        dots = ops.bconv2d(self._bits, packed, geometry)
        if not torch.equal(dots, self.float_call().round().to(torch.int32)):
            raise ValueError(
                f"The {self.backend} backend's accumulators of {shape.name} are wrong."
            )

    def engine_call(self) -> tuple[Tensor | None, Tensor | None]:
        """Run it on bits, epilogue included."""
        return self._fused(self._bits, self._residual)

    def kernel_call(self, *, fused: bool) -> Callable[[], float]:
        """Return a call that runs it as a native program and returns the seconds of its one step.

        Args:
            fused: with the residual, the clamp and the float map; otherwise the output is only the
                next layer's bits: an accumulator's scale, bias and threshold.

        Raises:
            ValueError: the backend is not cpu.
        """
        if self.backend != "cpu":
            raise ValueError(
                f"Programs run on backend cpu, but {self.shape.name} runs on {self.backend}."
            )
        program, geometry = CpuProgram(), self.shape.geometry
        bits = program.add_map(geometry.in_channels, self.shape.size, self.shape.size, packed=True)
        _, channels, height, width = self._residual.shape
        residual = program.add_map(channels, height, width) if fused else None
        outputs = program.add(
            "conv",
            bits=bits,
            residual=residual,
            geometry=geometry,
            weight=self._packed,
            want_float=fused,
            want_bits=True,
            **self._epilogue.values(),
        )
        maps = [bits] if residual is None else [bits, residual]
        program.finish(maps, outputs)
        inputs = (self._bits, self._residual)[: len(maps)]

        def call() -> float:
            _, (seconds,) = program.timed(*inputs)
            return seconds

        return call

    def float_call(self) -> Tensor:
        """Run PyTorch's float32 convolution in channels_last memory."""
        return F.conv2d(self._signs, self._weight, None, self.shape.stride, 1)


def network_work(
    shapes: Sequence[ConvShape], batch: int = 1
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return two calls that run all binary convolutions of a network: in float, and on bits."""
    works = [LayerWork(shape, batch) for shape in shapes for _ in range(shape.count)]

    def in_float() -> None:
        for work in works:
            work.float_call()

    def on_bits() -> None:
        for work in works:
            work.engine_call()

    return in_float, on_bits
