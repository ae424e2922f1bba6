"""The batch size as a symbol, and the questions that a model must not ask about it.

A trace assumes that the symbol is 2 or more. So it answers `if x.shape[0] > 1` without a guard,
although the answer is different for a batch of 1.
"""

from __future__ import annotations

import contextlib
import sys
from types import FrameType
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv, uninteresting_files

from biper_engine.conversion.trace_log import TraceLog, is_of_torch, is_own
from biper_engine.errors import ConversionError

__all__ = ["BatchSizes"]

_ADVICE = (
    "a converted network must work for every batch size. Use x.shape[0] or -1 in its reshapes, do "
    "not branch on the batch size, and compute numbers with it, such as "
    "1 / math.sqrt(x.numel()), in training only."
)
_SYMBOLS = uninteresting_files()
"""Files of PyTorch that only forward a question."""

_CONDITIONS = (torch.SymBool.__bool__.__code__, torch.SymBool.__int__.__code__)
_TRACE = "_trace"
"""The function of `capture` below which no frame is the model's."""

_OPERATOR = "an argument of an operator, such as `groups` of a convolution"

_FRAMES = 10
"""Python frames of PyTorch between a condition and its evaluation, and a few more."""


class BatchSizes(ShapeEnv):
    """Symbolic sizes that refuse a branch on the batch, however a trace decides it."""

    def __init__(self, log: TraceLog) -> None:
        super().__init__()
        self._log = log

    def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        known = len(self.guards)
        result = super().evaluate_expr(orig_expr, *args, **kwargs)
        line = ""
        if len(self.guards) > known:
            line = _line_in_front()
        elif getattr(orig_expr, "is_Relational", False):
            line = _asking_line()
            line = line if line and _differs(orig_expr, result) else ""
        if line:
            self._log.refuse(f"The model branches on the batch size in {line}; {_ADVICE}")
        return result

    def require_free(self, batches: list[Any]) -> None:
        """Require that the trace is valid for more than one batch size.

        Raises:
            ConversionError: it is valid only for one.
        """
        if any(self.simplify(batch.node.expr).is_number for batch in batches):
            raise ConversionError(f"The model works for one batch size only; {_ADVICE}")


def _differs(condition: Any, result: Any) -> bool:
    """Whether a condition on one symbol has another answer if the symbol is 1."""
    symbols = condition.free_symbols
    if len(symbols) != 1:
        return False
    at_one = condition.subs(symbols.pop(), 1)
    return not at_one.free_symbols and bool(at_one) != bool(result)


def _line_in_front() -> str:
    """Return the line of the model that caused a new guard, or "" for PyTorch's own guards."""
    frame = sys._getframe(2)
    while frame is not None and _passes_on(frame.f_code.co_filename):
        if frame.f_code.co_name == _TRACE:
            return _OPERATOR
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None and frame.f_code.co_filename == contextlib.__file__:
        return _calling_line(frame)  # a decorator of PyTorch, which asks about an argument
    name = frame.f_code.co_filename if frame is not None else "<"
    return "" if name.startswith("<") or is_of_torch(name) else f"{name}, line {frame.f_lineno}"


def _calling_line(frame: FrameType | None) -> str:
    """Return the line of the model that called an operator, as far as the stack has it."""
    while frame is not None and frame.f_code.co_name != _TRACE:
        name = frame.f_code.co_filename
        if not (name == contextlib.__file__ or is_of_torch(name) or _passes_on(name)):
            return f"{name}, line {frame.f_lineno}"
        frame = frame.f_back
    return _OPERATOR


def _passes_on(filename: str) -> bool:
    return filename in _SYMBOLS or is_own(filename)


def _asking_line() -> str:
    """Return the line of the model's code that asks, or "" if PyTorch itself asks."""
    frame = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame is None or frame.f_back is None:
            break
        caller = frame.f_back
        if frame.f_code in _CONDITIONS:
            name = caller.f_code.co_filename
            return "" if is_of_torch(name) else f"{name}, line {caller.f_lineno}"
        frame = caller
    return ""
