"""The clock of a profile: a network run node by node, in turn with whole calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.graph.reading import interpret

__all__ = ["Times", "measure"]

_IN_A_ROW = 5  # calls


@dataclass(frozen=True)
class Times:
    """Seconds of calls in order.

    Attributes:
        nodes: for every operator and program, the sizes of its first tensor, and for each call the
            times of the program's steps, or a single one.
        inside: sums of these.
        calls: whole calls, in turn with those.
    """

    nodes: dict[fx.Node, tuple[Sequence[int], list[list[float]]]]
    inside: list[float]
    calls: list[float]


def measure(
    bound: fx.GraphModule,
    inputs: Sequence[Tensor],
    device: torch.device | None,
    rounds: int,
    call: Callable[[], Any],
) -> Times:
    """Run a network node by node with a clock, in turn with some of `call` in a row.

    Calls in a row find their code in the caches, as they do without us.
    """
    times, now = Times({}, [], []), _clock(device)

    def run_node(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert callable(node.target)
        if node.target is operator.getitem:
            return node.target(*args)
        run = node.meta.get("run")
        if run is not None:
            result, taken = run.program.timed(*args)
        else:
            start = now()
            result = node.target(*args, **kwargs)
            taken = [now() - start]
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        sizes = tensors[0].shape if tensors else ()
        times.nodes.setdefault(node, (sizes, []))[1].append(taken)
        times.inside[-1] += sum(taken)
        return result

    def time_call() -> None:
        start = now()
        call()
        times.calls.append(now() - start)

    bound.forward(*inputs)  # warms up
    for first in range(0, rounds, _IN_A_ROW):
        turns = range(first, min(first + _IN_A_ROW, rounds))
        for _ in turns:
            times.inside.append(0.0)
            interpret(bound, inputs, run_node)
        call()
        for _ in turns:
            time_call()
    return times


def _clock(device: torch.device | None) -> Callable[[], float]:
    """Return a clock of the work on a device, in seconds."""
    if device is None or device.type != "cuda":
        return perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return perf_counter()

    return now
