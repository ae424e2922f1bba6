"""An engine beside the float network: equal first, then timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from biper_engine.bench.machine import machine_facts
from biper_engine.bench.rivals import Rival, compiled_rival, eager_rival
from biper_engine.bench.timer import Budget, Samples, interleave
from biper_engine.engine import Engine

__all__ = ["ENGINE", "Comparison", "Contest", "compare", "torch_threads"]

ENGINE = "engine"


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All contestants at one batch size.

    Attributes:
        batch: images per call.
        samples: by contestant; "engine" is one of them.
        reasons: why a contestant did not run, by its name.
        differences: largest difference of an output from the eager network's, relative to the
            largest output, by contestant. A bit on its threshold may flip in any of them, since
            floats before it round differently; `biper_engine.verify` looks at each layer by itself.
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
        model: the float network, in eval mode.
        batches: images [N, C, H, W], float32; one contest each.
        threads: of every contestant; None keeps torch's number.
        compiled: also compare with `torch.compile`, which takes a while to compile.
        budget: of each contest.

    Raises:
        ValueError: `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"`threads` (={threads}) must be 1 or more.")
    with torch_threads(threads), torch.no_grad():
        rivals = [eager_rival(model)]
        contests, settings = [], {rival.name: rival.how for rival in rivals}
        for images in batches:
            images = images.contiguous(memory_format=torch.channels_last)
            runners = [*rivals, *([compiled_rival(model, images)] if compiled else [])]
            settings |= {rival.name: rival.how for rival in runners}
            contests.append(_contest(engine, runners, images, budget or Budget()))
        return Comparison(
            threads=torch.get_num_threads(),
            settings=settings,
            contests=tuple(contests),
            machine=machine_facts(),
        )


def _contest(engine: Engine, rivals: list[Rival], images: Tensor, budget: Budget) -> Contest:
    calls = {rival.name: rival.call for rival in rivals if rival.call is not None}
    calls[ENGINE] = engine
    wanted = _largest_tensor(calls[rivals[0].name](images))
    differences = {name: _difference(call(images), wanted) for name, call in calls.items()}
    bound = {name: (lambda call=call: call(images)) for name, call in calls.items()}
    return Contest(
        batch=len(images),
        samples=interleave(bound, budget),
        reasons={rival.name: rival.reason for rival in rivals if rival.call is None},
        differences=differences,
    )


def _largest_tensor(outputs: Any) -> Tensor:
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return max((leaf for leaf in leaves if isinstance(leaf, Tensor)), key=Tensor.numel)


def _difference(outputs: Any, wanted: Tensor) -> float:
    scale = float(wanted.abs().max()) or 1.0
    return float((_largest_tensor(outputs) - wanted).abs().max()) / scale


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Use this number of torch's threads inside; None leaves it."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
