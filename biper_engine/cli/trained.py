"""What follows a training: the engine, its file, and a summary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biper_engine.cli.console import command_line, shown_warnings, status
from biper_engine.errors import ConversionError
from biper_engine.files import sha256_of

if TYPE_CHECKING:
    from biper_engine import ConversionReport, VerifyReport
    from biper_engine.training import StageResult, TrainingResult

__all__ = ["Packed", "pack", "summary"]

_VERIFIED_IMAGES = 256
_FILE = "model.biper"
_VERIFIED = "verify.json"


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A `.biper` file made of a finished run.

    Attributes:
        path: the file.
        report: what runs on bits.
        verified: the comparison with the network.
        images: on which the comparison was made.
        accuracy: share of the measured images that the engine classifies correctly, or None.
    """

    path: Path
    report: ConversionReport
    verified: VerifyReport
    images: int
    accuracy: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "path": str(self.path),
            "bytes": self.path.stat().st_size,
            "bytes_before": self.report.bytes_before,
            "packed": self.report.packed,
            "layers": len(self.report.layers),
            "verified": self.verified.ok,
            "verified_images": self.images,
            "accuracy": self.accuracy,
        }


def pack(result: TrainingResult) -> Packed:
    """Convert stage 2 of a run, compare it with the network on the run's images, and save it.

    Raises:
        ConversionError: the engine differs from the network; nothing is saved.
    """
    import torch

    import biper_engine

    assert result.feed is not None
    model = biper_engine.load_checkpoint(result.stage2.path)
    images = result.feed.sample(_VERIFIED_IMAGES).images.contiguous()
    with status("Converting"), shown_warnings():
        engine = biper_engine.convert(model, images[:2])
    with status(f"Verifying on {len(images)} images"):
        verified = biper_engine.verify(engine, model, images)
    if not verified.ok:
        raise ConversionError(
            f"The engine differs from '{result.stage2.path}', so that no file was written. The "
            f"checkpoint is fine; please report this. {verified}"
        )
    path = result.output_dir / _FILE
    engine.save(path)
    part = result.feed.test if result.feed.test is not None else result.feed.held_out
    with status("Measuring the engine"):
        cpu = torch.device("cpu")
        accuracy = None if part is None else result.feed.accuracy(engine, part, cpu)
    packed = Packed(
        path=path, report=engine.report, verified=verified, images=len(images), accuracy=accuracy
    )
    _record(packed)
    return packed


def _record(packed: Packed) -> None:
    """Write what was found beside the file, with its checksum: a later file is another one."""
    from biper_engine.training.result import write_json

    values = {
        **packed.to_dict(),
        "path": packed.path.name,
        "sha256": sha256_of(packed.path),
        "summary": packed.verified.summary(),
        "report": json.loads(packed.verified.to_json()),
    }
    write_json(packed.path.with_name(_VERIFIED), values)


def summary(
    result: TrainingResult, packed: Packed | None, *, is_binary: bool = True
) -> tuple[list[str], dict[str, Any]]:
    """Return a run's lines, of which the last one says what follows, and its JSON values."""
    following: str | None = None
    if packed is not None:
        following = command_line("run", packed.path, "IMAGE")
    elif is_binary:
        following = command_line("convert", result.stage2.path)
    stages = (result.stage1, result.stage2)
    values: dict[str, Any] = {
        f"stage{number}": {"path": str(stage.path), **stage.to_dict()}
        for number, stage in enumerate(stages, start=1)
    }
    values["file"] = None if packed is None else packed.to_dict()
    values["next"] = following
    lines = []
    for number, stage in enumerate(stages, start=1):
        lines += _stage_lines(number, stage)
    if packed is not None:
        lines += _file_lines(packed, result.stage2)
    lines.append(f"for a page of it: {command_line('report', result.output_dir)}")
    last = f"next: {following}" if following else "No engine: the network has no binary layer."
    return [*lines, last], values


def _stage_lines(number: int, stage: StageResult) -> list[str]:
    accuracy, where = _measured(stage)
    right = "" if accuracy is None else f", {accuracy:.2%} of {where} images right"
    lines = [f"stage {number}: {stage.epochs} epochs, {stage.seconds:.1f} s{right}"]
    if stage.skipped:
        lines.append(f"  {len(stage.skipped)} images could not be read and were left out")
    return [*lines, f"  {stage.path}"]


def _measured(stage: StageResult) -> tuple[float | None, str]:
    if stage.validation_accuracy is not None:
        return stage.validation_accuracy, "held-out training"
    return stage.test_accuracy, "test"


def _file_lines(packed: Packed, stage: StageResult) -> list[str]:
    report, verified = packed.report, packed.verified
    size = packed.path.stat().st_size
    lines = [
        f"engine: packed {report.packed}/{len(report.layers)} layers, {report.bytes_before:,} -> "
        f"{size:,} bytes ({report.bytes_before / size:.1f} times smaller)",
        f"  verified on {packed.images} images: {verified.layers_equal}/{verified.layers} binary "
        f"layers equal; end to end {verified.end_to_end}",
    ]
    if packed.accuracy is not None:
        lines.append(f"  {packed.accuracy:.2%} of {_measured(stage)[1]} images right")
    return [*lines, f"  {packed.path}"]
