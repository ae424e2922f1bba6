"""The check of `verify` and `convert`: the model itself, segment by segment, end to end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from biper_engine.conversion.end_to_end import EndToEnd
from biper_engine.conversion.modes import plain_modes
from biper_engine.conversion.observe import Observed
from biper_engine.conversion.pipeline import Built
from biper_engine.conversion.segments import Segments
from biper_engine.conversion.truth import Truth
from biper_engine.conversion.verify_report import SegmentReport, VerifyReport
from biper_engine.engine import Engine
from biper_engine.graph.structure import flatten_structure

__all__ = ["Batch", "check_against_model"]

Batch = tuple[Tensor, ...]


def check_against_model(
    engine: Engine, model: nn.Module, built: Built, batches: Iterable[Batch]
) -> VerifyReport:
    """Compare an engine with its model.

    If all batches have the same size, the first image is also compared alone, or a single image
    three times. At the end, the model is called with the first batch again.

    Args:
        engine: the engine.
        model: the model itself; copies of it are called.
        built: a conversion of the model that equals the engine, operator by operator.
        batches: flat inputs.

    Raises:
        ConversionError: a call changes the model, equal inputs give different outputs, or the model
            takes the sign of NaN.
    """
    check = _Check(engine, model, built)
    sizes, first = set(), None
    for batch in batches:
        first = batch if first is None else first
        sizes.add(batch[0].shape[0])
        check.report.images += batch[0].shape[0]
        if not check.compare(batch):
            return check.report
    if first is not None:
        if len(sizes) == 1 and not check.compare(_another_size(first), counted=False):
            return check.report
        check.finish()
    return check.report


def _another_size(batch: Batch) -> Batch:
    images = batch[0].shape[0]
    size = 1 if images > 1 else 3
    return tuple(x[torch.arange(size, device=x.device) % images] for x in batch)


class _Check:
    def __init__(self, engine: Engine, model: nn.Module, built: Built) -> None:
        self.report = VerifyReport()
        self._engine = engine
        self._built = built
        self._observed = Observed(model, built.in_spec)
        self._segments: dict[str, SegmentReport] = {}
        self._sizes: set[int] = set()  # batch sizes for which the simplified graph was compared
        self._agreed = 0
        self._end_to_end: EndToEnd | None = None

    def compare(self, batch: Batch, *, counted: bool = True) -> bool:
        """Compare one batch; return whether to compare the next one.

        If a batch is not counted, only its rows with errors are kept, and what is found end to end.
        """
        report, built = self.report, self._built
        segments: dict[str, SegmentReport] = self._segments if counted else {}
        observation = self._observed(batch)
        truth = Truth(built, batch)
        truth.compare_with_model(observation, self._observed, report.model)
        if not report.model.captured:
            self._observed.again()  # says so if earlier calls are the cause
        else:
            # The rewriting does not depend on the data, but it may depend on the batch size.
            is_new = len(self._sizes) < 2 and batch[0].shape[0] not in self._sizes
            self._sizes.add(batch[0].shape[0])
            truth.add_simplified(report.model if is_new else None)
        if not report.model.ok:
            return False
        with plain_modes():
            forced = Segments(built, truth, segments)
            forced.run(*batch)
            self._end_to_end = self._end_to_end or EndToEnd(self._engine, built.lowered)
            self._end_to_end.count(batch, forced.layer_inputs, self._segments, counted=counted)
            args, kwargs = pytree.tree_unflatten(list(batch), self._engine.signature.in_spec)
            results = flatten_structure(self._engine(*args, **kwargs))[0]
        agreed = _compare_outputs(report, truth.outputs, results)
        if counted:
            self._agreed += agreed
            return True
        for name, row in segments.items():
            if not row.ok:
                row.name = f"{name} (batch of {batch[0].shape[0]})"
                self._segments[row.name] = row
        return True

    def finish(self) -> None:
        """Call the model once more and summarise."""
        again = self._observed.again()
        self.report.model.batches.append(int(again.inputs[0].shape[0]))
        self.report.segments = list(self._segments.values())
        if self.report.top1_agreement is not None:
            self.report.top1_agreement = self._agreed / self.report.images


def _compare_outputs(report: VerifyReport, wanted: tuple[Any, ...], got: list[Any]) -> int:
    """Record errors of the outputs; return the number of images with the same argmax."""
    pairs = [
        (a, b)
        for a, b in zip(wanted, got, strict=True)
        if isinstance(a, Tensor) and a.numel() and not a.dtype.is_complex
    ]
    for a, b in pairs:
        rows = max(1, a.shape[0] if a.dim() else 1)
        truth, result = a.double().reshape(rows, -1), b.double().reshape(rows, -1)
        same = (truth == result) | (truth.isnan() & result.isnan())
        difference = torch.where(same, 0.0, truth - result)
        norms = truth.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        relative = difference.norm(dim=1) / norms
        report.logit_error = max(report.logit_error, float(difference.abs().max()))
        report.relative_error = max(report.relative_error, float(relative.max()))
    if len(pairs) != 1 or pairs[0][0].dim() != 2 or pairs[0][0].shape[1] < 2:
        return 0
    report.top1_agreement = 0.0
    wanted_class, class_of_engine = (x.double().argmax(1) for x in pairs[0])
    return int((wanted_class == class_of_engine).sum())
