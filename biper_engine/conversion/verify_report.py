"""The report of `verify`: the model itself, one row per segment, and the whole network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

__all__ = ["FLOAT_TOLERANCE", "ROUNDING", "ModelReport", "SegmentReport", "VerifyReport"]

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative error of rounding a number to a dtype."""

FLOAT_TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 32 * ROUNDING[torch.float16],
    torch.bfloat16: 32 * ROUNDING[torch.bfloat16],
}
"""Largest error of a float map over its largest magnitude. In float32 this is the rounding of sums
of up to 2^16 terms. In half precision, inputs, weights and results are rounded, but sums are not;
32 roundings allow for cancellation and for operators that amplify errors."""

_TRACE = 1e-3
"""Share of values above which the report adds a note."""


@dataclass
class ModelReport:
    """The captured graph against the model itself, and the simplified graph against the captured.

    Attributes:
        batches: sizes of the batches with which the model was called.
        bit_equal: whether the captured graph's outputs always equal the model's bit for bit.
        error: largest difference of an output, over its largest magnitude, if they do not.
        pass_error: largest difference of a value of the simplified graph.
        pass_wrong: the first node of the simplified graph that differs, or empty.
    """

    batches: list[int] = field(default_factory=list)
    bit_equal: bool = True
    error: float = 0.0
    pass_error: float = 0.0
    pass_wrong: str = ""

    @property
    def captured(self) -> bool:
        """Whether the captured graph gives the model's outputs, up to the order of float sums."""
        return self.error <= FLOAT_TOLERANCE[torch.float32]

    @property
    def ok(self) -> bool:
        """Whether both graphs give the model's outputs."""
        return self.captured and not self.pass_wrong

    def __str__(self) -> str:
        sizes = ", ".join(str(size) for size in dict.fromkeys(self.batches))
        calls = f"{len(self.batches)} calls, batches of {sizes}"
        if not self.captured:
            return f"the captured graph DIFFERS by {self.error:.1%} ({calls})"
        if self.pass_wrong:
            return f"the simplified graph DIFFERS by {self.pass_error:.1e} at {self.pass_wrong}"
        how = "bit for bit" if self.bit_equal else f"within rounding, {self.error:.1e}"
        return f"the captured graph gives what the model gives, {how} ({calls})"


@dataclass
class SegmentReport:
    """One node of the engine against the model's values, over all images.

    Attributes:
        name: layer or node.
        accumulators: number of integers compared; 0 for a float segment.
        accumulators_wrong: number of those that are unequal.
        bits: number of bits compared.
        flips: bits that differ while the value is within rounding of the threshold.
        bits_wrong: all other bits that differ.
        undecided: values so close to the threshold of a sign that rounding decides the sign.
        exact_zeros: inputs for which the model's sign is exactly 0.
        zero_outputs: outputs that such inputs reach; their bits and floats are not compared.
        float_error: largest error of the float map, over its largest magnitude.
        float_limit: largest allowed `float_error`.
        cancelled: floats that are left out of `float_error`, since they differ only by the rounding
            of terms that are far larger than their sum.
        input_bits: number of input bits of a binary layer.
        run_bits: the same when the engine runs from the input on, as it also does with a batch of
            another size.
        input_bits_differ: number of those that differ from the model's.
    """

    name: str
    accumulators: int = 0
    accumulators_wrong: int = 0
    bits: int = 0
    flips: int = 0
    bits_wrong: int = 0
    undecided: int = 0
    exact_zeros: int = 0
    zero_outputs: int = 0
    float_error: float = 0.0
    float_limit: float = FLOAT_TOLERANCE[torch.float32]
    cancelled: int = 0
    input_bits: int = 0
    run_bits: int = 0
    input_bits_differ: int = 0

    @property
    def ok(self) -> bool:
        """Whether accumulators are equal, bits differ only within rounding, and floats agree."""
        wrong = self.accumulators_wrong or self.bits_wrong
        return not wrong and self.float_error <= self.float_limit


@dataclass
class VerifyReport:
    """The result of `verify`.

    Attributes:
        model: the captured graph against the model itself.
        segments: one entry per compared node of the engine.
        images: number of images compared.
        mismatch: how the engine differs from a fresh conversion of the model, or empty.
        logit_error: largest |engine - model| over the images, of the whole network.
        relative_error: largest norm of that difference over that of the model's outputs, per image.
        top1_agreement: share of images with the same argmax; None if outputs are not logits.
    """

    model: ModelReport = field(default_factory=ModelReport)
    segments: list[SegmentReport] = field(default_factory=list)
    images: int = 0
    mismatch: str = ""
    logit_error: float = 0.0
    relative_error: float = 0.0
    top1_agreement: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the graph is the model's, and every segment agrees; see `verify`."""
        compared = bool(self.images) and all(s.ok for s in self.segments)
        return not self.mismatch and self.model.ok and compared

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
        """Number of bits that differ within rounding, each layer on the model's own values."""
        return sum(s.flips for s in self.segments)

    @property
    def exact_zeros(self) -> int:
        """Number of inputs for which the model's sign is exactly 0, over all layers."""
        return sum(s.exact_zeros for s in self.segments)

    @property
    def input_bits(self) -> int:
        """Number of input bits of binary layers."""
        return sum(s.input_bits for s in self.segments)

    @property
    def run_bits(self) -> int:
        """Number of input bits of binary layers when the whole network runs."""
        return sum(s.run_bits for s in self.segments)

    @property
    def input_bits_differ(self) -> int:
        """Number of those that differ from the model's when the engine runs from the input on."""
        return sum(s.input_bits_differ for s in self.segments)

    # -- text -------------------------------------------------------------------------------------

    def table(self) -> str:
        """Return the whole report as text, at most 80 columns wide if names allow it."""
        if self.mismatch or not self.model.ok:
            return self.summary()
        return "\n".join([*self._notes(), *self._rows(), *self._verdicts()])

    def summary(self) -> str:
        """Return the report without its rows."""
        if self.mismatch:
            return f"not verified: {self.mismatch}"
        if not self.model.ok:
            return f"not verified: {self.model}"
        return "\n".join([*self._notes(), *self._verdicts()])

    def _notes(self) -> list[str]:
        """Return the notes that a reader must see first."""
        notes = []
        zeros = _share(self.exact_zeros, self.input_bits)
        outputs = sum(s.zero_outputs for s in self.segments)
        if zeros > _TRACE:
            accumulators = sum(s.accumulators for s in self.segments)
            notes.append(
                f"note: the model's sign is exactly 0 for {zeros:.2%} of the inputs of binary "
                f"layers, where a bit means +1. {_share(outputs, accumulators):.2%} of the outputs "
                "depend on them: their sums are compared with +1 there, their floats are not, and "
                "the network's outputs differ. An untrained network, or padding before the sign?"
            )
        cancelled = [s for s in self.segments if s.cancelled]
        if cancelled:
            count = sum(s.cancelled for s in cancelled)
            notes.append(
                f"note: {count:,} float values differ by the rounding of the terms that they are "
                f"the sums of, which is more than {FLOAT_TOLERANCE[torch.float32]:g} of the values "
                f"(in {_listed([s.name for s in cancelled])}). Their terms cancel, so that the "
                "model's own digits there are noise."
            )
        undecided = [s for s in self.segments if s.undecided]
        share = _share(sum(s.undecided for s in undecided), self.input_bits)
        if share > _TRACE:
            names = _listed([s.name for s in undecided])
            notes.append(
                f"note: {share:.2%} of the signs are decided by float rounding, since their "
                f"arguments are within rounding of the threshold ({names}). The model itself gives "
                "other outputs in another precision. A BatchNorm before the sign avoids this."
            )
        return notes

    def _rows(self) -> list[str]:
        width = max([len("segment"), *(len(s.name) for s in self.segments)])
        lines = [
            f"{'segment':{width}}  {'accumulators':>14}  {'bits':>12}  {'flips':>5}  {'zeros':>5}"
            "  float error"
        ]
        for s in self.segments:
            sums = f"{s.accumulators:,} {_sign(s.accumulators_wrong)}" if s.accumulators else "-"
            bits = f"{s.bits:,} {_sign(s.bits_wrong)}" if s.bits else "-"
            mark = "" if s.ok else "  WRONG"
            lines.append(
                f"{s.name:{width}}  {sums:>14}  {bits:>12}  {s.flips:5}  {s.exact_zeros:5}  "
                f"{s.float_error:.1e}{mark}"
            )
        return lines

    def _verdicts(self) -> list[str]:
        verdict = "equal" if self.ok else "NOT EQUAL"
        counts = _counted(self.flips, "bit", "flipped within rounding")
        return [
            f"model: {self.model}",
            f"{verdict}: {self.layers_equal} of {self.layers} binary layers on {self.images} "
            f"images, each on the model's own values; {counts}, {self.exact_zeros} exact zeros",
            f"end to end: {self.end_to_end}",
        ]

    @property
    def end_to_end(self) -> str:
        """The whole network from the input on, in one line: bits, error of the outputs, top-1."""
        agreement = (
            "" if self.top1_agreement is None else f", top-1 agreement {self.top1_agreement:.2%}"
        )
        first = next((s for s in self.segments if s.input_bits_differ), None)
        where = "" if first is None else f", {first.input_bits_differ:,} of them in {first.name}"
        return (
            f"{self.differing_bits()}{where}; largest output error {self.logit_error:.2e}, "
            f"relative {self.relative_error:.2e}{agreement}"
        )

    def differing_bits(self) -> str:
        """Return how many input bits of binary layers differ when the whole network runs."""
        if not self.input_bits_differ:
            return "no bit differs" if self.input_bits else "no bits"
        return f"{self.input_bits_differ:,} of {self.run_bits:,} bits differ"

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """Return every field, and `ok`, as a JSON object."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)


def _sign(wrong: int) -> str:
    return "!" if wrong else "="


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _counted(count: int, what: str, how: str) -> str:
    return f"no {what} {how}" if not count else f"{count:,} {what}{'s' * (count != 1)} {how}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
