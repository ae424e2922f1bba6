"""What `verify` reports: one row per segment, and the whole network."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import torch

__all__ = ["FLOAT_TOLERANCE", "SegmentReport", "VerifyReport"]

FLOAT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest error of a float map over its largest magnitude: rounding of sums of up to 2^16 terms."""


@dataclass
class SegmentReport:
    """One node of the engine against the float graph, over all images.

    Attributes:
        name: layer or node.
        accumulators: integers compared; 0 for a float segment.
        accumulators_wrong: of them, unequal.
        bits: bits compared.
        flips: bits that differ where the value is within rounding of the threshold.
        bits_wrong: bits that differ elsewhere.
        exact_zeros: inputs at which the model's sign is exactly 0.
        float_error: largest error of the float map, over its largest magnitude.
        float_limit: what `float_error` may be.
    """

    name: str
    accumulators: int = 0
    accumulators_wrong: int = 0
    bits: int = 0
    flips: int = 0
    bits_wrong: int = 0
    exact_zeros: int = 0
    float_error: float = 0.0
    float_limit: float = FLOAT_TOLERANCE[torch.float32]

    @property
    def ok(self) -> bool:
        """Whether accumulators are equal, no bit differs without cause and floats agree."""
        wrong = self.accumulators_wrong or self.bits_wrong
        return not wrong and self.float_error <= self.float_limit


@dataclass
class VerifyReport:
    """The result of `verify`.

    Attributes:
        segments: one entry per node of the engine that was compared.
        images: images compared.
        mismatch: how the engine differs from a fresh conversion of the model, or empty.
        logit_error: largest |engine - model| over the images, of the whole network.
        relative_error: largest norm of that difference over that of the model's outputs, per image.
        top1_agreement: share of images with the same argmax; None where outputs are no logits.
    """

    segments: list[SegmentReport] = field(default_factory=list)
    images: int = 0
    mismatch: str = ""
    logit_error: float = 0.0
    relative_error: float = 0.0
    top1_agreement: float | None = None

    @property
    def ok(self) -> bool:
        """Whether every segment agrees; see the module for what that means."""
        return not self.mismatch and bool(self.images) and all(s.ok for s in self.segments)

    @property
    def layers_equal(self) -> int:
        """Number of binary layers whose accumulators are all equal."""
        return sum(s.accumulators > 0 and not s.accumulators_wrong for s in self.segments)

    @property
    def layers(self) -> int:
        """Number of binary layers compared."""
        return sum(s.accumulators > 0 for s in self.segments)

    @property
    def flips(self) -> int:
        """Bits that differ within rounding."""
        return sum(s.flips for s in self.segments)

    @property
    def exact_zeros(self) -> int:
        """Inputs at which the model's sign is exactly 0, over all layers."""
        return sum(s.exact_zeros for s in self.segments)

    def table(self) -> str:
        """Return the report as aligned text of at most 80 columns where names allow."""
        if self.mismatch:
            return f"not verified: {self.mismatch}"
        width = max([len("segment"), *(len(s.name) for s in self.segments)])
        lines = [
            f"{'segment':{width}}  {'accumulators':>14}  {'bits':>12}  {'flips':>5}  {'zeros':>5}"
            "  float error"
        ]
        for s in self.segments:
            sums = (
                f"{s.accumulators:,} {'=' if not s.accumulators_wrong else '!'}"
                if s.accumulators
                else "-"
            )
            bits = f"{s.bits:,} {'=' if not s.bits_wrong else '!'}" if s.bits else "-"
            mark = "" if s.ok else "  WRONG"
            lines.append(
                f"{s.name:{width}}  {sums:>14}  {bits:>12}  {s.flips:5}  {s.exact_zeros:5}  "
                f"{s.float_error:.1e}{mark}"
            )
        agreement = (
            "" if self.top1_agreement is None else f", top-1 agreement {self.top1_agreement:.2%}"
        )
        lines.append(
            f"{'equal' if self.ok else 'NOT EQUAL'}: {self.layers_equal} of {self.layers} binary "
            f"layers on {self.images} images; {self.flips} bits flipped within rounding, "
            f"{self.exact_zeros} exact zeros"
        )
        lines.append(
            f"whole network: largest output error {self.logit_error:.2e}, relative "
            f"{self.relative_error:.2e}{agreement}"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """Return every field, and `ok`, as a JSON object."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)
