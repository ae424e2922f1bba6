"""The step `layers`: binary convolutions and products beside cuDNN and cuBLAS, one run for all.

Ours does everything that a network does in that place: scale, residual, clamp, float16 map and
bits, or only bits, as the network has it. The rivals do the bare product: `F.conv2d` in float16,
channels_last; `torch._int_mm` of the size of the convolution, for which images would have to be
unfolded first, in no one's time here. Launches are in CUDA graphs, so Python is in no one's time.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from gpu_budget import Deadline, Job, do
from gpu_machine import keep, no_gpu
from gpu_roofline import Conv
from gpu_timer import Contender, Graphed, clock_of, turns
from torch import Tensor

from biper_engine import ops
from biper_engine.bench.timer import Budget
from biper_engine.errors import BackendUnavailableError
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops.backends import by_name

BATCHES = (1, 64, 256)
BACKENDS = ("cuda", "triton")
BUDGET = Budget(seconds=0.3, fewest=5, most=60, warmup=0)
STREAM = torch.float16
GRAPH_CALLS = 10
HALVING = Pool2dGeometry(kernel_size=(2, 2), stride=(2, 2))


def conv(
    network: str,
    channels: tuple[int, int],
    size: int,
    *,
    stride: int = 1,
    kernel: int = 3,
    groups: int = 1,
    **what: Any,
) -> Conv:
    kind = {1: "", channels[0]: " dw"}.get(groups, f" g{groups}") + (" 1x1" if kernel == 1 else "")
    wide = str(channels[0]) if channels[0] == channels[1] else f"{channels[0]}>{channels[1]}"
    half = (kernel - 1) // 2
    return Conv(
        name=f"{wide}@{size}" + (f"/{stride}" if stride > 1 else "") + kind,
        network=network,
        geometry=Conv2dGeometry(
            in_channels=channels[0],
            out_channels=channels[1],
            kernel_size=(kernel, kernel),
            stride=(stride, stride),
            padding=(half,) * 4,
            groups=groups,
        ),
        size=(size, size),
        **what,
    )


STREAMED = {"residual": True, "want_float": True}
# In the order of importance: what no longer fits is skipped. ResNet-34 has the shapes of 18.
RESNET = (
    conv("ImageNet ResNet-18/34", (64, 64), 56, count=4, **STREAMED),
    conv("ImageNet ResNet-18/34", (128, 128), 28, count=3, **STREAMED),
    conv("ImageNet ResNet-18/34", (256, 256), 14, count=3, **STREAMED),
    conv("ImageNet ResNet-18/34", (512, 512), 7, count=3, **STREAMED),
    conv("ImageNet ResNet-18/34", (64, 128), 56, stride=2, **STREAMED),
    conv("ImageNet ResNet-18/34", (128, 256), 28, stride=2, **STREAMED),
    conv("ImageNet ResNet-18/34", (256, 512), 14, stride=2, **STREAMED),
)
VGG = (
    conv("VGG-small", (128, 128), 32, pool=HALVING),
    conv("VGG-small", (128, 256), 16),
    conv("VGG-small", (256, 256), 16, pool=HALVING),
    conv("VGG-small", (256, 512), 8),
    conv("VGG-small", (512, 512), 8, pool=HALVING, want_float=True, want_bits=False),
)
CIFAR = (
    conv("CIFAR ResNet-18", (64, 64), 32, count=2),
    conv("CIFAR ResNet-18", (64, 64), 32, count=2, **STREAMED),
    conv("CIFAR ResNet-18", (64, 128), 32, stride=2),
    conv("CIFAR ResNet-18", (256, 256), 8, **STREAMED),
    conv("CIFAR ResNet-18", (512, 512), 4, **STREAMED),
)
MOBILENET = (
    conv("MobileNet", (64, 64), 112, groups=4, **STREAMED),
    conv("MobileNet", (256, 256), 28, groups=16, **STREAMED),
    conv("MobileNet", (512, 512), 14, groups=32, **STREAMED),
    conv("MobileNet", (512, 512), 14, kernel=1, **STREAMED),
    conv("MobileNet", (1024, 1024), 7, kernel=1, **STREAMED),
)
PRODUCTS = tuple(
    Conv(
        name=f"{size}x{size}x{size}",
        network="product",
        geometry=Conv2dGeometry(in_channels=size, out_channels=size, kernel_size=(1, 1)),
        size=(size // 32, 32),
    )
    for size in (1024, 2048, 4096, 8192)
)


def cases() -> Iterator[tuple[Conv, int]]:
    """Give layers and batch sizes, the most important first."""
    for batch in (256, 1, 64):
        yield from ((layer, batch) for layer in RESNET)
    yield from ((product, 1) for product in PRODUCTS)
    for layers in (VGG, MOBILENET, CIFAR):
        for batch in (256, 1, 64):
            yield from ((layer, batch) for layer in layers)


class Case:
    """Operands of one layer at one batch size, from a fixed seed."""

    def __init__(self, layer: Conv, batch: int, device: torch.device) -> None:
        self.layer, self.batch, self.device = layer, batch, device
        generator = torch.Generator(device).manual_seed(0)
        geometry = layer.geometry
        channels = geometry.out_channels

        def signs(*shape: int) -> Tensor:
            bits = torch.randint(0, 2, shape, generator=generator, device=device)
            return (bits * 2 - 1).to(STREAM)

        def uniform() -> Tensor:
            return torch.rand(channels, generator=generator, device=device)

        self.signs = signs(batch, geometry.in_channels, *layer.size)
        self.signs = self.signs.contiguous(memory_format=torch.channels_last)
        self.weight = signs(channels, geometry.group_channels, *geometry.kernel_size)
        self.weight = self.weight.contiguous(memory_format=torch.channels_last)
        with ops_on("reference"):
            self.bits, self.packed = ops.binarize(self.signs), ops.binarize(self.weight)
        self.epilogue = ops.Epilogue(
            multiplier=(uniform() - 0.25) * (4 / geometry.reduction**0.5),
            bias=uniform() - 0.5,
            pool=layer.pool,
            pool_min=None if layer.pool.is_identity else torch.arange(channels, device=device) < 0,
            clamp_min=-1.0,
            clamp_max=1.0,
            threshold=(uniform() - 0.5) / 4 if layer.want_bits else None,
            sense=uniform() < 0.5 if layer.want_bits else None,
        )
        shape = (batch, channels, *layer.output_size())
        residual = torch.randn(shape, generator=generator, device=device).to(STREAM)
        residual = residual.contiguous(memory_format=torch.channels_last)
        self.residual = residual if layer.residual else None

    def to(self, device: torch.device) -> Self:
        """Return the same operands on another device."""
        moved = copy.copy(self)
        moved.device = device
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        tensors: dict[str, Any] = {n: t.to(device) for n, t in self.epilogue.tensors().items()}
        moved.epilogue = dataclasses.replace(self.epilogue, **tensors)
        return moved

    def ours(self, backend: str) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """Return the whole layer on a backend.

        Raises:
            BackendUnavailableError: it cannot run this.
        """
        layer, found = self.layer, by_name(backend)
        op = f"bconv2d{'_float' * layer.want_float}{'_bits' * layer.want_bits}"
        reason = found.unsupported_reason(op, layer.geometry, self.device)
        if reason is not None:
            raise BackendUnavailableError(reason)
        prepacked = ops.prepack(self.packed, layer.geometry, backend)
        dtype = STREAM if layer.want_float else None
        run = found.bind_fused(layer.geometry, self.epilogue, prepacked, dtype, layer.want_bits)
        return partial(run, self.bits, self.residual)

    def float16(self) -> Callable[[], Tensor]:
        """Return the bare product in float16: cuDNN's convolution, or cuBLAS."""
        geometry = self.layer.geometry
        if self.layer.network == "product":
            a = self.signs.permute(0, 2, 3, 1).reshape(-1, geometry.in_channels)
            return partial(torch.mm, a, self.weight.flatten(1).t())
        padding = geometry.padding[0]
        return lambda: F.conv2d(
            self.signs, self.weight, None, geometry.stride, padding, groups=geometry.groups
        )

    def int8(self) -> Callable[[], Tensor]:
        """Return the product of bytes of the same size.

        Raises:
            BackendUnavailableError: there is none, as for groups.
        """
        geometry = self.layer.geometry
        if geometry.groups > 1:
            raise BackendUnavailableError("no product of one size does the work of groups")
        rows, columns = geometry.output_size(*self.layer.size)
        shapes = (
            (self.batch * rows * columns, geometry.reduction),
            (
                geometry.out_channels,
                geometry.reduction,
            ),
        )
        a, b = (torch.ones(shape, dtype=torch.int8, device=self.device) for shape in shapes)
        for operand in (a, b):
            operand -= 2 * torch.randint_like(operand, 0, 2)
        return partial(torch._int_mm, a, b.t())


def ops_on(backend: str) -> Any:
    from biper_engine.ops.backends import use_backend

    return use_backend(backend)


def equal(got: tuple[Tensor | None, ...], wanted: tuple[Tensor | None, ...]) -> bool:
    """Tell whether maps have the same shapes, dtypes and bytes."""
    return all(_same(a, b) for a, b in zip(got, wanted, strict=True))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    integer = torch.int16 if a.itemsize == 2 else torch.int32
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def contest(layer: Conv, batch: int, device: torch.device, budget: Budget) -> dict[str, Any]:
    """Check ours against the reference, then time all on one layer.

    Returns:
        JSON values; "wrong" names backends whose answers differ, which are not timed.
    """
    case = Case(layer, batch, device)
    wanted = case.ours("reference")()
    calls: dict[str, Callable[[], Any]] = {}
    reasons, wrong = {}, []
    for name in BACKENDS:
        try:
            call = case.ours(name)
            if equal(call(), wanted):
                calls[name] = call
            else:
                wrong.append(name)
        except (BackendUnavailableError, RuntimeError) as error:
            reasons[name] = str(error).strip().splitlines()[0]
    calls["float16"] = case.float16()
    try:
        calls["int8"] = case.int8()
    except BackendUnavailableError as error:
        reasons["int8"] = str(error)
    contenders = []
    for name, call in calls.items():
        try:
            graphed = Graphed(call, GRAPH_CALLS, device)
            contenders.append(Contender(name=name, call=graphed, repeats=GRAPH_CALLS))
        except RuntimeError as error:  # cuBLAS and cuDNN refuse some sizes, capture some calls
            reasons[name] = str(error).strip().splitlines()[0]
    taken = turns(contenders, clock_of(device), budget, turn_s=0.005, alone=1)
    work = layer.work(batch, STREAM.itemsize)
    return {
        "network": layer.network,
        "layer": layer.name,
        "variant": variant(layer),
        "batch": batch,
        "work": work.to_dict(),
        "ms": {name: found.throughput.median_ms for name, found in taken.items()},
        "quartiles_ms": {name: found.throughput.quartiles_ms for name, found in taken.items()},
        "did_not_run": reasons,
        "wrong": wrong,
    }


def variant(layer: Conv) -> str:
    """Return what goes in beside bits, and what comes out, in a few words."""
    parts = [
        *(["residual"] if layer.residual else []),
        *([] if layer.pool.is_identity else ["pool"]),
        *(["floats"] if layer.want_float else []),
        *(["bits"] if layer.want_bits else []),
    ]
    return "+".join(parts)


def main() -> int:
    reason = no_gpu()
    if reason is not None:
        print(f"no GPU: {reason}")
        return 1
    found: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    device = torch.device("cuda")

    def measure(layer: Conv, batch: int) -> None:
        values = contest(layer, batch, device, BUDGET)
        found.append(values)
        keep("layers", {"contests": found, "skipped": skipped})
        times = ", ".join(f"{name} {1e3 * ms:.1f} us" for name, ms in values["ms"].items())
        wrong = f"; WRONG: {', '.join(values['wrong'])}" if values["wrong"] else ""
        print(f"{layer.network} {layer.name} {values['variant']}, batch {batch}: {times}{wrong}")

    jobs = (
        Job(
            name=f"{layer.network} {layer.name} {variant(layer)}, batch {batch}",
            needs_s=2.0,
            run=partial(measure, layer, batch),
        )
        for layer, batch in cases()
    )
    broken = ""
    try:
        with torch.inference_mode():
            skipped |= do(jobs, Deadline.of_step(90))
    except RuntimeError as error:  # what a kernel did wrong ends every use of the GPU
        broken = str(error).strip().splitlines()[0]
    keep("layers", {"contests": found, "skipped": skipped})
    for entry in found:
        for name, why in entry["did_not_run"].items():
            print(f"did not run: {entry['layer']}, batch {entry['batch']}, {name}: {why}")
    wrong = sum(bool(entry["wrong"]) for entry in found)
    ran = {name for entry in found for name in entry["ms"]}
    absent = [name for name in BACKENDS if name not in ran]
    if broken:
        print(f"the GPU failed behind {len(found)} layers: {broken}")
        return 1
    if wrong or absent:
        print(f"{wrong} layers wrong; backends that ran nowhere: {', '.join(absent) or 'none'}")
        return 1
    print(f"{len(found)} layers measured, all equal to the reference; {len(skipped)} skipped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
