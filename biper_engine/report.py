"""Report what happened to every operator that multiplies: plain data, printed as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ConversionReport", "LayerReport"]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One operator that multiplies: a convolution, a linear layer, a product of two activations.

    Attributes:
        name: module path in the model; numbered when one module is called more than once.
        kind: "conv2d", "linear", "conv1d", "conv3d", "conv_transpose2d" and the like, "matmul",
            "attention", "bilinear" or "recurrent".
        packed: whether it runs on bits.
        reason: why it stays in floating point; empty if packed.
        shape: weight shape, as in the model; for a product of two activations, the right one's.
        macs: multiply-accumulates for one image, at every position, including padded taps.
        weight_bits_before: bits of the float weight; 0 for a product of two activations.
        weight_bits_after: bits of the weight as stored now.
        zero_weights: weights that are exactly 0. Output channels of three values, -s, 0 and s, are
            packed twice, with 0 as s and as -s, and averaged.
        binary: whether its weight or its input is binary.
        binary_weight: whether its weight has two values in every output channel, or -s, 0 and s.
        ties: output channels in which a sum can equal the threshold of the next sign. Float32
            rounding then decides the model's own bit; a BatchNorm in between avoids this.
        weights_packed: whether it computes in floating point with weights that are held as bits.
        by_choice: whether it stays in floating point on purpose: `keep_float` names it, or bits are
            slower. A binary operator that stays for another reason causes a warning.
    """

    name: str
    kind: str
    packed: bool
    reason: str
    shape: tuple[int, ...]
    macs: int
    weight_bits_before: int
    weight_bits_after: int
    zero_weights: int = 0
    binary: bool = False
    binary_weight: bool = False
    ties: int = 0
    by_choice: bool = False
    weights_packed: bool = False

    @property
    def note(self) -> str:
        """Why it stays in floating point; for a packed one, its weights of 0 and its ties."""
        notes = [self.reason] if self.reason else []
        if self.weights_packed:
            notes.append("its weights are held as bits")
        if self.packed and self.zero_weights:
            plural = "s are" if self.zero_weights > 1 else " is"
            notes.append(f"{self.zero_weights:,} weight{plural} 0")
        if self.ties:
            notes.append(
                f"sums of {self.ties} output channel{'s' * (self.ties > 1)} can equal the next "
                "sign's threshold, and then the model's float32 rounding decides"
            )
        return "; ".join(notes)


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """Every operator of a converted network that multiplies, in order of execution.

    Attributes:
        layers: one row per operator.
        bytes_before: bytes of the model's parameters and buffers.
        bytes_after: bytes of the engine's tensors.
    """

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int

    @property
    def packed(self) -> int:
        """Number of layers that run on bits."""
        return sum(layer.packed for layer in self.layers)

    @property
    def binary_macs(self) -> int:
        """Multiply-accumulates of one image that run on bits."""
        return sum(layer.macs for layer in self.layers if layer.packed)

    @property
    def float_macs(self) -> int:
        """Multiply-accumulates of one image that stay in floating point."""
        return sum(layer.macs for layer in self.layers if not layer.packed)

    def table(self) -> str:
        """Return the report as aligned text, one line per layer, in 80 columns if names allow."""
        width = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':{width}}  {'runs on':7}  {'weight':>15}  {'MMACs':>8}  why float"]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            runs = "bits" if layer.packed else "float"
            lines.append(
                f"{layer.name:{width}}  {runs:7}  {shape:>15}  {layer.macs / 1e6:8.2f}  "
                f"{layer.note}".rstrip()
            )
        lines.append(
            f"{self.packed} of {len(self.layers)} layers packed; MACs on bits "
            f"{self.binary_macs:,}, in float {self.float_macs:,}; "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of JSON values; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConversionReport:
        """Build from a dict that `to_dict` returned.

        Raises:
            TypeError, KeyError: the dict has other keys.
        """
        layers = tuple(
            LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in values["layers"]
        )
        return cls(
            layers=layers,
            bytes_before=values["bytes_before"],
            bytes_after=values["bytes_after"],
        )
