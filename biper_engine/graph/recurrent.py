"""Recurrent layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from biper_engine.graph.arguments import BOOL, FALSE, TENSOR, TENSORS, integer, number
from biper_engine.graph.operator import Operator
from biper_engine.graph.values import FLOATS, Value, require, same_dtype

__all__ = ["OPERATORS"]

_MOST_LAYERS = 64


def _lstm(
    input: Value,
    hx: Sequence[Value],
    params: Sequence[Value],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Value, ...]:
    same_dtype(FLOATS, input=input, **{f"part {at}": x for at, x in enumerate((*hx, *params))})
    require(input.rank == 3 and len(hx) == 2, f"`input` is {input}, `hx` has {len(hx)} tensors")
    batch, steps = input.shape[:2] if batch_first else input.shape[1::-1]
    for size in (batch, steps, input.shape[2]):
        require(size >= 1, f"`input` (={input}) is empty")
    directions = 2 if bidirectional else 1
    hidden = hx[0].shape[-1] if hx[0].rank else 0
    require(isinstance(hidden, int) and hidden >= 1, f"`hx` is {hx[0]}")
    state = (num_layers * directions, batch, hidden)
    for x in hx:
        require(x.shape == state, f"`hx` must be {list(map(str, state))}, but it is {x}")
    wanted: list[tuple[Any, ...]] = []
    for layer in range(num_layers):
        inputs = input.shape[2] if layer == 0 else hidden * directions
        weights = [(4 * hidden, inputs), (4 * hidden, hidden)]
        biases = [(4 * hidden,)] * 2 if has_biases else []
        wanted += [*weights, *biases] * directions
    fits = [x.shape for x in params] == wanted
    require(fits, f"`params` do not fit an LSTM of {hidden} units with `input` (={input})")
    return input.like(*input.shape[:2], hidden * directions), input.like(*state), input.like(*state)


OPERATORS: list[Operator] = [
    Operator(
        name="lstm",
        target=torch.ops.aten.lstm.input,
        arguments={
            "input": TENSOR,
            **dict.fromkeys(("hx", "params"), TENSORS),
            "has_biases": BOOL,
            "num_layers": integer(1, _MOST_LAYERS),
            "dropout": number(0, 0),
            "train": FALSE,
            "bidirectional": BOOL,
            "batch_first": BOOL,
        },
        result=_lstm,
    ),
]
