"""Compare another runtime with the engine, before anything is written.

The multiply-add behind an accumulator may be rounded differently elsewhere, so that a value next to
its threshold becomes the other bit, and one such bit can change others behind it. Therefore an
image on which no bit differs must give the engine's outputs up to rounding, and the first layer in
which bits differ may have few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.bits import unpack_channels
from biper_engine.converted import ConvertedNetwork
from biper_engine.errors import ExportError
from biper_engine.export.report import Agreement
from biper_engine.graph.reading import interpret
from biper_engine.graph.signature import InputSpec

__all__ = ["Run", "compare", "example_inputs"]

Run = Callable[[Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""Takes the inputs; returns the outputs, and the maps of +-1 [N, C, H, W] in the graph's order."""

BATCHES = (2, 3, 1)
# Outputs without a differing bit: sums in another order, and multiply-adds rounded twice.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Values within rounding of their thresholds are fewer, also where a network was never trained.
_MOST_FLIPS = 0.05

_biper = torch.ops.biper


def example_inputs(specs: Sequence[InputSpec], batch: int, seed: int = 0) -> list[Tensor]:
    """Return seeded inputs of a batch: normal floats, or small integers."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for spec in specs:
        shape = [batch if size is None else size for size in spec.shape]
        if spec.dtype.is_floating_point:
            made.append(torch.randn(shape, generator=generator).to(spec.dtype))
        else:
            made.append(torch.randint(0, 2, shape, generator=generator).to(spec.dtype))
    return made


def compare(
    network: ConvertedNetwork, run: Run, runtime: str, batches: Sequence[int] = BATCHES
) -> Agreement:
    """Run another runtime beside the engine's operators, on seeded inputs.

    Raises:
        ExportError: the answers differ by more than flips within rounding can explain.
    """
    found = [_Batch.of(network, run, batch, seed) for seed, batch in enumerate(batches)]
    flipped = [batch.first_different for batch in found if batch.first_different]
    for batch in found:
        batch.require_agreement(runtime)
    if not any(batch.agreeing for batch in found) and not flipped:
        raise ExportError(
            f"{runtime} gives other outputs than the engine, by up to "
            f"{max(batch.difference for batch in found):.3g}, so nothing was written. This is a "
            "defect of biper_engine: please report it with the model."
        )
    rows = [row for batch in found for row in batch.same_top]
    return Agreement(
        runtime=runtime,
        images=sum(batches),
        largest_difference=max(batch.difference for batch in found),
        largest_output=max(batch.scale for batch in found),
        bits=sum(batch.bits for batch in found),
        bits_differ=sum(batch.bits_differ for batch in found),
        first_different=flipped[0] if flipped else None,
        top1=sum(rows) / len(rows) if rows else None,
    )


@dataclass(frozen=True)
class _Batch:
    """One batch in both: the worst of each image, and the bits of each layer."""

    errors: list[float]  # per image, relative to the tolerance
    difference: float
    scale: float
    bits: int
    flips: dict[str, tuple[int, int]]  # differing bits of each layer, and all
    clean: list[bool]  # per image: no bit differs
    same_top: list[bool]

    @classmethod
    def of(cls, network: ConvertedNetwork, run: Run, size: int, seed: int) -> _Batch:
        inputs = example_inputs(network.signature.inputs, size, seed)
        wanted, layers = _engine(network, inputs)
        got, maps = run(inputs)
        errors, difference, scale = [0.0] * size, 0.0, 0.0
        for ours, theirs in zip(wanted, got, strict=True):
            tolerance = _TOLERANCE.get(ours.dtype, 0.0)
            ours, theirs = ours.double(), theirs.double()
            largest = float(ours.abs().max()) if ours.numel() else 0.0
            gap = (ours - theirs).abs().nan_to_num(torch.inf)
            gap = torch.where((ours == theirs) | (ours.isnan() & theirs.isnan()), 0.0, gap)
            difference = max(difference, float(gap.max()) if gap.numel() else 0.0)
            scale = max(scale, largest)
            per_image = gap.flatten(1).amax(1) if len(gap) == size else gap.max().expand(size)
            limit = tolerance * largest
            errors = [
                max(known, float(new) / limit if limit else (torch.inf if new > 0 else 0.0))
                for known, new in zip(errors, per_image, strict=True)
            ]
        different = _different(layers, maps)
        clean = [
            not any(bool(layer[image].any()) for layer in different.values())
            for image in range(size)
        ]
        flips = {name: (int(layer.sum()), layer.numel()) for name, layer in different.items()}
        logits = len(wanted) == 1 and wanted[0].dim() == 2 and wanted[0].shape[1] > 1
        same = (wanted[0].argmax(1) == got[0].argmax(1)).tolist() if logits else []
        bits = sum(total for _, total in flips.values())
        return cls(errors, difference, scale, bits, flips, clean, same)

    @property
    def bits_differ(self) -> int:
        return sum(count for count, _ in self.flips.values())

    @property
    def first_different(self) -> str | None:
        return next((name for name, (count, _) in self.flips.items() if count), None)

    @property
    def agreeing(self) -> int:
        """The number of images with the engine's outputs, up to rounding."""
        return sum(error <= 1 for error in self.errors)

    def require_agreement(self, runtime: str) -> None:
        """Require that flips within rounding explain every difference."""
        first = self.first_different
        if first is not None:
            count, total = self.flips[first]
            if count > _MOST_FLIPS * total:
                raise ExportError(
                    f"{runtime} gives other bits than the engine, {count:,} of {total:,} in "
                    f"{first}, so nothing was written. This is a defect of biper_engine: please "
                    "report it with the model."
                )
        if not self.bits:
            return
        for error, clean in zip(self.errors, self.clean, strict=True):
            if clean and error > 1:
                raise ExportError(
                    f"{runtime} gives the engine's bits but other outputs, by up to "
                    f"{self.difference:.3g}, so nothing was written. This is a defect of "
                    "biper_engine: please report it with the model."
                )


def _engine(
    network: ConvertedNetwork, inputs: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run the engine's operators; return the outputs and the bits [N, H, W, C] of each layer."""
    layers: dict[str, Tensor] = {}

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        channels = sign_channels(node, args)
        if channels is not None:
            bits = result[1] if isinstance(result, tuple) else result
            layers[node.name] = unpack_channels(bits, channels)
        return result

    with torch.no_grad():
        outputs = interpret(network.graph_module, inputs, call)
    return [x for x in outputs if isinstance(x, Tensor)], layers


def sign_channels(node: fx.Node, args: Sequence[Any]) -> int | None:
    """Return the channels of the packed map whose signs a node takes, or None for other nodes."""
    if node.target is _biper.binarize.default:
        return int(args[0].shape[1])
    if node.target in (_biper.bconv2d_bits.default, _biper.bconv2d_float_bits.default):
        return int(args[1].shape[0])
    return None


def _different(layers: dict[str, Tensor], maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return where bits differ, by layer; nothing if the runtime has other maps, or none."""
    ours = [bits.permute(0, 3, 1, 2) for bits in layers.values()]
    if [bits.shape for bits in ours] != [signs.shape for signs in maps]:
        return {}
    return {name: bits != (signs > 0) for name, bits, signs in zip(layers, ours, maps, strict=True)}
