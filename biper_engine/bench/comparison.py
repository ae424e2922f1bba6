"""An engine beside its float network, called in turn in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from biper_engine.bench.machine import machine_facts
from biper_engine.bench.rivals import Rival, compiled_rival, eager_rival
from biper_engine.bench.threads import common_threads, torch_threads
from biper_engine.bench.timer import Budget, Samples, interleave
from biper_engine.engine import Engine

__all__ = ["ENGINE", "Comparison", "Contest", "compare"]

ENGINE = "engine"


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All contestants at one batch size.

    Attributes:
        batch: images per call.
        samples: by contestant; "engine" is one of them.
        reasons: why a rival did not run, by its name.
        differences: largest difference of an output from the eager network's, over the largest
            output, by rival. A bit on its threshold may flip in a compiled network, too, since the
            floats before it round differently. Whether the engine is right is not for a difference
            of logits to say: see `biper_engine.verify`.
    """

    batch: int
    samples: dict[str, Samples]
    reasons: dict[str, str]
    differences: dict[str, float]

    def times_as_fast(self, rival: str) -> float:
        """Return the rival's median over the engine's."""
        return self.samples[rival].median_ms / self.samples[ENGINE].median_ms


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An engine and its rivals, at several batch sizes.

    Attributes:
        threads: of every contestant.
        settings: what each rival is, by name.
        contests: one per batch size.
        machine: what it was measured on.
    """

    threads: int
    settings: dict[str, str]
    contests: tuple[Contest, ...]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, raw samples included."""
        return {
            "threads": self.threads,
            "settings": self.settings,
            "machine": self.machine,
            "batches": [_contest_to_dict(contest) for contest in self.contests],
        }


def _contest_to_dict(contest: Contest) -> dict[str, Any]:
    rivals = [name for name in contest.samples if name != ENGINE]
    return {
        "batch": contest.batch,
        "contestants": {name: taken.to_dict() for name, taken in contest.samples.items()},
        "engine_times_as_fast": {name: contest.times_as_fast(name) for name in rivals},
        "largest_relative_difference": contest.differences,
        "did_not_run": contest.reasons,
    }


def compare(
    engine: Engine,
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    threads: int | None = None,
    compiled: bool = True,
    budget: Budget | None = None,
) -> Comparison:
    """Time an engine beside its float network, eager and compiled, called in turn.

    Whether the engine is right is for `biper_engine.verify` to say, before.

    Args:
        engine: takes one tensor.
        model: the float network.
        batches: images [N, C, H, W], float32; one contest each.
        threads: of every contestant; None takes what the engine uses by itself.
        compiled: also compare with `torch.compile`, which takes a while to compile.
        budget: of each contest.

    Raises:
        ValueError: `threads` is below 1, or the engine would use another number.
    """
    threads = common_threads(threads)
    with torch_threads(threads), torch.inference_mode():
        eager = eager_rival(model)
        contests, settings = [], {eager.name: eager.how}
        for images in batches:
            images = images.contiguous(memory_format=torch.channels_last)
            rivals = [eager, *([compiled_rival(model, images)] if compiled else [])]
            settings |= {rival.name: rival.how for rival in rivals}
            contests.append(_contest(engine, rivals, images, budget or Budget()))
        return Comparison(
            threads=threads,
            settings=settings,
            contests=tuple(contests),
            machine=machine_facts(),
        )


def _contest(engine: Engine, rivals: Sequence[Rival], images: Tensor, budget: Budget) -> Contest:
    calls = {rival.name: rival.call for rival in rivals if rival.call is not None}
    first, *others = calls
    wanted = calls[first](images)
    differences = {name: _difference(calls[name](images), wanted) for name in others}
    bound = {name: (lambda call=call: call(images)) for name, call in calls.items()}
    return Contest(
        batch=len(images),
        samples=interleave({**bound, ENGINE: lambda: engine(images)}, budget),
        reasons={rival.name: rival.reason for rival in rivals if rival.call is None},
        differences=differences,
    )


def _difference(outputs: Any, wanted: Any) -> float:
    pairs = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(wanted), strict=True)
    return max((_relative(a, b) for a, b in pairs if isinstance(a, Tensor)), default=0.0)


def _relative(outputs: Tensor, wanted: Tensor) -> float:
    scale = float(wanted.abs().max()) or 1.0
    return float((outputs - wanted).abs().max()) / scale
