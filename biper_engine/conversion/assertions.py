"""Conditions on values of the input that do not decide what the model computes.

A branch on a value cannot be captured, with two exceptions. If one side of it only raises, as in
`if x.max() > 1: raise ValueError(...)` or `assert (x >= 0).all()`, then the other side is what the
model computes whenever it computes something. If the only side just tells of the value, as in
`if x.max() > 1: print("large")`, or stops in a debugger, the model computes the same without it.
The engine computes that, without the check.
"""

from __future__ import annotations

import ast
import dis
import linecache
from collections.abc import Iterator
from functools import lru_cache
from types import FrameType

__all__ = ["answer_of_a_check", "described"]

_TRANSPARENT = ("no_grad", "inference_mode", "enable_grad", "set_grad_enabled", "autocast")
"""Context managers that let exceptions through."""

_TELLING = ("print", "breakpoint", "pdb", "ipdb", "warnings", "logging", "logger", "log")
"""Functions, or what their functions belong to, that compute nothing."""

_Place = tuple[int | None, int | None, int | None, int | None]
"""First line, last line, first column and end column of an expression."""


def answer_of_a_check(
    frame: FrameType, callers: list[FrameType], *, always: bool = False
) -> bool | None:
    """Return the truth value with which a model computes; None if both sides compute something.

    Args:
        frame: the frame of the model that asks for the truth of a tensor.
        callers: the frames of the model around it, which might catch what is raised.
        always: whether the frame calls a function that raises if a tensor is not true.
    """
    raising = not any(_is_caught(caller) for caller in (frame, *callers))
    tree = _tree(frame.f_code.co_filename)
    if always or tree is None:
        return True if always and raising else None
    places = _places(frame)
    for statement in ast.walk(tree):
        wanted = _wanted(statement, raising)
        if wanted is None or not isinstance(statement, ast.Assert | ast.If):
            continue
        answer = _answer(statement.test, places, wanted)
        if answer is not None:
            return answer
    return None


def described(frame: FrameType) -> str:
    """Return the line of a check, with its place."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"`{line:.100}` ({frame.f_code.co_filename}:{frame.f_lineno})"


def _places(frame: FrameType) -> list[_Place]:
    """Return possible places of the expression whose truth a frame asks for.

    In Python 3.11 a jump has the place of its whole statement. The instruction before it, which
    made the value, has the place of the expression.
    """
    instructions = list(dis.get_instructions(frame.f_code))
    at = next(i for i, one in enumerate(instructions) if one.offset == frame.f_lasti)
    asking = any(word in instructions[at].opname for word in ("_IF_", "TO_BOOL", "UNARY_NOT"))
    found = []
    for one in instructions[max(0, at - asking) : at + 1]:
        place = one.positions
        if place is not None and None not in (place.lineno, place.col_offset):
            found.append((place.lineno, place.end_lineno, place.col_offset, place.end_col_offset))
    return found


@lru_cache(maxsize=64)
def _parsed(filename: str, text: str) -> ast.Module | None:
    try:
        return ast.parse(text, filename)
    except SyntaxError:
        return None


def _tree(filename: str) -> ast.Module | None:
    text = "".join(linecache.getlines(filename))
    return _parsed(filename, text) if text else None


def _wanted(statement: ast.AST, raising: bool) -> bool | None:
    """Return the truth of a statement's condition with which the model computes, or None.

    Args:
        statement: any part of the model's code.
        raising: whether what it raises leaves the model.
    """
    if isinstance(statement, ast.Assert) and raising:
        return True
    if not isinstance(statement, ast.If):
        return None
    if not statement.orelse and all(_only_tells(part) for part in statement.body):
        return False
    body, orelse = _only_raises(statement.body), _only_raises(statement.orelse)
    return orelse if raising and body != orelse else None


def _only_tells(statement: ast.stmt) -> bool:
    """Whether a statement prints, logs, warns or stops in a debugger, and does nothing else."""
    if isinstance(statement, ast.Import | ast.Pass):
        return True
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    called, *inner = (part for part in ast.walk(statement) if isinstance(part, ast.Call))
    words = ast.unparse(called.func).removeprefix("self.").split(".")
    # A call inside of it could change a tensor in place, as `x.add_(1)` does, or the model.
    names = [ast.unparse(part.func) for part in inner]
    changes = any(name.endswith("_") or name.startswith("self.") for name in names)
    return words[0].lstrip("_") in _TELLING and not changes


def _only_raises(statements: list[ast.stmt]) -> bool:
    simple = (ast.Expr, ast.Assign, ast.AnnAssign)
    return (
        bool(statements)
        and isinstance(statements[-1], ast.Raise)
        and all(isinstance(statement, simple) for statement in statements[:-1])
    )


def _answer(test: ast.expr, places: list[_Place], wanted: bool) -> bool | None:
    """Return the truth of the part at one of `places` with which `test` as a whole is `wanted`.

    Parts of `and` and `or` are asked from left to right until the whole is decided, so that each
    part that is asked may get the truth that decides it in the wanted way, or leaves it open.
    """
    at = (test.lineno, test.end_lineno, test.col_offset, test.end_col_offset)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        # An instruction that asks for the truth of x has the place of x or of `not x`.
        return not wanted if at in places else _answer(test.operand, places, not wanted)
    if isinstance(test, ast.BoolOp):
        found = (_answer(part, places, wanted) for part in test.values)
        return next((answer for answer in found if answer is not None), None)
    if any(isinstance(part, ast.NamedExpr) for part in ast.walk(test)):
        return None
    return wanted if at in places else None


def _is_caught(frame: FrameType) -> bool:
    """Whether an exception from this place of a frame may be caught in the frame itself."""
    tree = _tree(frame.f_code.co_filename)
    if tree is None:
        return True
    return any(_catches(part) for part in _around(tree, frame.f_lineno))


def _catches(part: ast.AST) -> bool:
    if isinstance(part, ast.With | ast.AsyncWith):  # its `__exit__` may catch
        words = [ast.unparse(item.context_expr).partition("(")[0] for item in part.items]
        return not all(word.rpartition(".")[2] in _TRANSPARENT for word in words)
    return isinstance(part, ast.Try | ast.TryStar) and bool(part.handlers)


def _around(tree: ast.AST, line: int) -> Iterator[ast.AST]:
    """Yield the statements around a line; of a `try`, only if the line is in its body."""
    for part in ast.walk(tree):
        if isinstance(part, ast.Try | ast.TryStar):
            first, last = part.body[0].lineno, part.body[-1].end_lineno or 0
            if first <= line <= last:
                yield part
        elif isinstance(part, ast.stmt) and part.lineno <= line <= (part.end_lineno or 0):
            yield part
