"""Compare an engine with its float network, called in turn in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import sleep
from typing import Any

import torch
from torch import Tensor, nn

from biper_engine.bench.machine import machine_facts
from biper_engine.bench.rivals import (
    FloatNetworks,
    Rival,
    compiled_bf16_rival,
    compiled_rival,
    deployed_rivals,
    eager_rival,
    relative_difference,
)
from biper_engine.bench.threads import common_threads, torch_threads
from biper_engine.bench.timer import Budget, Samples, interleave
from biper_engine.engine import Engine

__all__ = [
    "ENGINE",
    "TURNS",
    "Checked",
    "Comparison",
    "Contest",
    "compare",
    "facts_of",
    "in_turn_and_alone",
]

ENGINE = "engine"

TURNS = Budget(pause_ms=5.0, ahead=3)
"""How turns start among runtimes that have their own threads. A pause lets the threads of the
previous turn fall asleep, but a call right after it takes 1.3 to 2.4 times its time alone, since
its own threads sleep, too. After three uncounted calls it takes the same time as alone."""

_ALONE_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Results of the checks of all contestants at one batch size, before they were timed.

    Attributes:
        batch: images per call.
        reasons: why a rival did not run, by its name.
        differences: by rival, the largest difference between its outputs and those it is compared
            with, over the largest output. A bit whose value is at the threshold may flip in a
            compiled network, too, since the floats before it are rounded differently. A difference
            of logits does not show whether the engine is right: see `biper_engine.verify`.
        beside: what each of `differences` is from: the eager network, its float twin or the engine.
        agreed: by rival whose outputs must agree, the images that did and the images tried.
        kernels: how many nodes of a rival each kind of kernel runs, if its runtime tells.
    """

    batch: int
    reasons: dict[str, str]
    differences: dict[str, float]
    beside: dict[str, str] = field(default_factory=dict)
    agreed: dict[str, tuple[int, int]] = field(default_factory=dict)
    kernels: dict[str, dict[str, int]] = field(default_factory=dict)

    def checks_to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "largest_relative_difference": self.differences,
            "difference_from": self.beside,
            "images_agreed": {name: list(counts) for name, counts in self.agreed.items()},
            "kernels": self.kernels,
            "did_not_run": self.reasons,
        }


@dataclass(frozen=True, kw_only=True)
class Contest(Checked):
    """All contestants at one batch size.

    Attributes:
        samples: by contestant; "engine" is one of them.
        alone_ms: medians of each contestant called repeatedly without the others, before and
            after the turns; empty if this was not measured.
    """

    samples: dict[str, Samples]
    alone_ms: dict[str, float] = field(default_factory=dict)

    def times_as_fast(self, rival: str) -> float:
        """Return the rival's median over the engine's."""
        return self.samples[rival].median_ms / self.samples[ENGINE].median_ms


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An engine and its rivals, at several batch sizes.

    Attributes:
        threads: number of threads of every contestant.
        settings: a description of each rival, by name.
        contests: one per batch size.
        machine: the machine that it was measured on.
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
        "alone_ms": contest.alone_ms,
        **contest.checks_to_dict(),
    }


def compare(
    engine: Engine,
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    threads: int | None = None,
    compiled: bool = True,
    deployed: bool = False,
    budget: Budget | None = None,
) -> Comparison:
    """Time an engine and its float network, eager and compiled, called in turn.

    This does not check the engine: call `biper_engine.verify` first.

    Args:
        engine: takes one tensor.
        model: the float network.
        batches: images [N, C, H, W], float32; one contest each.
        threads: number of threads of every contestant; None takes the engine's default.
        compiled: also compare with `torch.compile`, which takes a while to compile.
        deployed: also compare with other ways to deploy: `torch.compile` in bfloat16 if `compiled`,
            and all of `rivals.deployed_rivals`; and time each contestant alone, too.
        budget: budget of each contest; None takes five seconds, or with `deployed` twenty seconds
            and the turns of `TURNS`.

    Raises:
        ValueError: `threads` is below 1, or the engine would use another number.
        ConversionError: `deployed`, and the model cannot be captured.
    """
    threads = common_threads(threads)
    budget = budget or (replace(TURNS, seconds=20.0) if deployed else Budget())
    networks = FloatNetworks.of(model, batches[0]) if deployed and batches else None
    with torch_threads(threads), torch.inference_mode():
        eager = eager_rival(model)
        contests, settings = [], {eager.name: eager.how}
        for images in batches:
            images = images.contiguous(memory_format=torch.channels_last)
            rivals = [eager, *([compiled_rival(model, images)] if compiled else [])]
            if networks is not None:
                rivals += [compiled_bf16_rival(networks.network, images)] if compiled else []
                rivals += deployed_rivals(engine, networks, images, threads)
            settings |= {rival.name: rival.how for rival in rivals}
            contests.append(_contest(engine, rivals, images, budget, alone=deployed))
        return Comparison(
            threads=threads,
            settings=settings,
            contests=tuple(contests),
            machine=machine_facts(),
        )


def _contest(
    engine: Engine, rivals: Sequence[Rival], images: Tensor, budget: Budget, *, alone: bool
) -> Contest:
    eager, *others = (rival for rival in rivals if rival.call is not None)
    calls = {rival.name: rival.bound(images) for rival in (eager, *others)}
    wanted = calls[eager.name]()
    differences = {
        rival.name: relative_difference(
            calls[rival.name](), wanted if rival.wanted is None else rival.wanted(images)
        )
        for rival in others
    }
    calls[ENGINE] = lambda: engine(images)
    rest_ms = {rival.name: rival.rest_ms for rival in others}
    samples, alone_ms = (
        in_turn_and_alone(calls, budget, rest_ms) if alone else (interleave(calls, budget), {})
    )
    return Contest(
        batch=len(images),
        samples=samples,
        alone_ms=alone_ms,
        differences=differences,
        **facts_of(rivals, others),
    )


def in_turn_and_alone(
    calls: Mapping[str, Callable[[], object]], budget: Budget, rest_ms: Mapping[str, float]
) -> tuple[dict[str, Samples], dict[str, float]]:
    """Time functions in turn with `interleave`, and each for a short time without the others.

    Returns:
        The samples in turn, and the medians alone, in milliseconds.
    """
    # Measured before and after, so that a drifting clock rate does not look like a disturbance.
    before = _alone(calls, budget, rest_ms)
    samples = interleave(calls, budget, rest_ms)
    after = _alone(calls, budget, rest_ms)
    return samples, {name: Samples(before[name].ms + after[name].ms).median_ms for name in calls}


def facts_of(rivals: Sequence[Rival], compared: Sequence[Rival]) -> dict[str, Any]:
    """Return `reasons`, `beside`, `agreed` and `kernels` of `Checked`, taken from the rivals.

    Args:
        rivals: all rivals.
        compared: the rivals that run and whose outputs are compared.
    """
    return {
        "reasons": {rival.name: rival.reason for rival in rivals if rival.call is None},
        "beside": {rival.name: rival.beside for rival in compared},
        "agreed": {rival.name: rival.agreed for rival in compared if rival.agreed is not None},
        "kernels": {rival.name: rival.kernels for rival in compared if rival.kernels},
    }


def _alone(
    calls: Mapping[str, Callable[[], object]], budget: Budget, rest_ms: Mapping[str, float]
) -> dict[str, Samples]:
    """Call each function for a short time without the others."""
    short = replace(budget, seconds=min(_ALONE_SECONDS, budget.seconds), pause_ms=0.0, ahead=0)
    taken: dict[str, Samples] = {}
    for name, call in calls.items():
        sleep(1e-3 * budget.pause_ms)
        taken |= interleave({name: call}, short)
        sleep(1e-3 * rest_ms.get(name, 0.0))
    return taken
