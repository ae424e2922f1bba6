"""What an export wrote, and how far its runtime agreed with the engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Agreement", "ExportReport"]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far the outputs of another runtime agree with the engine's, on the same inputs.

    Attributes:
        runtime: name and version of the runtime.
        images: how many images both were given, in batches of several sizes.
        largest_difference: between two outputs.
        largest_output: of the engine, by magnitude.
        bits: how many bits of the packed maps were compared; 0 if the runtime does not show them.
        bits_differ: how many of these differ, from end to end.
        first_different: the first layer with another bit, or None.
        top1: the share of rows whose largest output is at the same place; None unless the outputs
            are logits.
    """

    runtime: str
    images: int
    largest_difference: float
    largest_output: float
    bits: int = 0
    bits_differ: int = 0
    first_different: str | None = None
    top1: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.bits:
            where = f", the first in {self.first_different}" if self.first_different else ""
            parts.append(f"{self.bits_differ:,} of {self.bits:,} bits differ{where}")
        relative = self.largest_difference / self.largest_output if self.largest_output else 0.0
        parts.append(f"largest difference {self.largest_difference:.2e}, relative {relative:.2e}")
        if self.top1 is not None:
            parts.append(f"top-1 agreement {self.top1:.2%}")
        return f"{self.runtime} on {self.images} images: {'; '.join(parts)}"


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What `Engine.export` wrote.

    Attributes:
        path: the file.
        format: its format.
        contents: what it holds, in words.
        file_bytes: size of all its files.
        agreement: how far a runtime agreed with the engine, or None if none was there.
        unchecked: why there is no agreement.
        notes: what a user should know about this file.
    """

    path: str
    format: str
    contents: str
    file_bytes: int
    agreement: Agreement | None = None
    unchecked: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        checked = f"not checked: {self.unchecked}"
        if self.agreement is not None:
            checked = f"checked with {self.agreement}"
        lines = [f"{self.path}: {self.contents}, {self.file_bytes:,} bytes", checked]
        return "\n  ".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of JSON values."""
        return asdict(self)
