"""What a trace observes: the current place in the model, and what a graph cannot express.

A model may catch the exception that stops it and continue in its `except` branch. So what was
observed is also recorded, and refused after the trace.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch.utils import _pytree as pytree

from biper_engine.conversion.assertions import answer_of_a_check, described
from biper_engine.errors import ConversionError

__all__ = ["TraceLog", "failing_line", "is_of_torch", "is_own", "random_reason"]

_TORCH = Path(torch.__file__).resolve().parent
_OWN = Path(__file__).resolve().parent

_SWITCHES = ("train", "training", "is_training")
_RATES = ("dropout_p", "dropout")


@dataclass
class TraceLog:
    """The state of one trace.

    Attributes:
        stack: paths of the modules that are running, the innermost last.
        paths: the module path of each operator that may be a layer, in order.
        out_spec: pytree structure of the result.
        refused: reasons why the model cannot be captured, in the order of the trace.
        dropped: checks of values that only raise; the captured graph has none of them.
    """

    stack: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    out_spec: pytree.TreeSpec | None = None
    refused: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def enter(self, path: str) -> None:
        """Enter a module's forward pass."""
        self.stack.append(path)

    def leave(self, path: str) -> None:
        """Leave it, and also passes that an exception or a manually called hook left open."""
        if path in self.stack:
            del self.stack[len(self.stack) - 1 - self.stack[::-1].index(path) :]

    @property
    def place(self) -> str:
        """Return the current place in the model as text: module path, file and line."""
        path = self.stack[-1] if self.stack else ""
        module = f"`{path}`" if path else "the model's own forward"
        line = _line_of_the_model()
        return f"{module} ({line})" if line else module

    def refuse(self, message: str) -> NoReturn:
        """Record that the model cannot be captured, and stop it.

        Raises:
            ConversionError: always; the model may catch it.
        """
        self.refused.append(message)
        raise ConversionError(message)

    def require_nothing_refused(self, cause: BaseException | None = None) -> None:
        """Require that nothing was recorded, even if the model continued.

        Raises:
            ConversionError: something was recorded; the message is the first reason.
        """
        if self.refused:
            raise ConversionError(self.refused[0]) from cause

    def passed_check(self, *, always: bool = False) -> bool | None:
        """Return the truth of a tensor with which the model does not raise, and note the check.

        Args:
            always: whether the model calls a function that raises if a tensor is not true.

        Returns:
            None if the line of the model that asks decides more than whether to raise.
        """
        frames = list(_frames_of_the_model())
        asking: FrameType | None = sys._getframe(1)
        while asking is not None and is_own(asking.f_code.co_filename):
            asking = asking.f_back
        if not frames or not (always or asking is frames[0]):
            return None
        answer = answer_of_a_check(frames[0], frames[1:], always=always)
        if answer is not None:
            self.dropped.append(described(frames[0]))
        return answer


def _frames_of_the_model() -> Iterator[FrameType]:
    """Yield the Python frames of the model's own code, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _CAPTURE:
        if _is_of_the_model(frame.f_code.co_filename):
            yield frame
        frame = frame.f_back


def _line_of_the_model() -> str:
    """Return file and line of the innermost Python frame of the model's own code."""
    frame = next(_frames_of_the_model(), None)
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def failing_line(cause: BaseException) -> str:
    """Return file and line of the innermost frame of the model in an exception's traceback."""
    found, trace, inside = "", cause.__traceback__, False
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        inside = inside or name == _CAPTURE
        if inside and _is_of_the_model(name):
            found = f"{name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


_CAPTURE = str(_OWN / "capture.py")


def _is_of_the_model(filename: str) -> bool:
    generated = filename.startswith("<")
    return not generated and not is_of_torch(filename) and not is_own(filename)


@lru_cache(maxsize=1024)
def is_of_torch(filename: str) -> bool:
    """Whether a source file belongs to PyTorch, also through a symbolic link."""
    return _TORCH in Path(filename).resolve().parents


@lru_cache(maxsize=1024)
def is_own(filename: str) -> bool:
    """Whether a source file belongs to the conversion."""
    return _OWN in Path(filename).resolve().parents


def random_reason(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return the name of an operator if this call draws random numbers, or None."""
    if torch.Tag.nondeterministic_seeded not in func.tags and "philox" not in func._schema.name:
        return None
    schema = func._schema.arguments
    named = {argument.name: argument.default_value for argument in schema}
    named |= dict(zip(named, args, strict=False)) | kwargs
    if any(named.get(switch) is False for switch in _SWITCHES):
        return None
    rates = ("p",) if "native_dropout" in func._schema.name else _RATES
    present = [named[rate] for rate in rates if rate in named]
    if present and not any(present):
        return None
    return str(func._schema.name.partition("::")[2].strip("_"))
