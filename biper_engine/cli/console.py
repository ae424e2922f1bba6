"""Where output goes: results to stdout; progress, warnings and errors to stderr."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = [
    "command_line",
    "print_json",
    "progress",
    "results",
    "show_error",
    "show_note",
    "shown_warnings",
    "status",
    "steps",
]

_T = TypeVar("_T")


def results(*, json_output: bool = False) -> Console:
    """Return the console for a command's results; with `--json`, stdout is for the JSON only."""
    return Console(stderr=json_output, highlight=False, emoji=False)


def _messages() -> Console:
    return Console(stderr=True, highlight=False, emoji=False)


def print_json(values: Any) -> None:
    """Print JSON to stdout."""
    typer.echo(json.dumps(values, indent=2))


def show_error(error: Exception) -> None:
    """Print one error to stderr, without a traceback."""
    console = _messages()
    text = str(error) or type(error).__name__
    console.print(f"[bold red]Error:[/bold red] [red]{escape(text)}[/red]", soft_wrap=True)


def show_note(text: str) -> None:
    """Print a line to stderr."""
    _messages().print(text, markup=False, soft_wrap=True)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Print warnings from inside the context to stderr, one line each, without a source line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    console = _messages()
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            text = f"[yellow]Warning:[/yellow] {escape(str(warning.message))}"
            console.print(text, soft_wrap=True)


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show a spinner on stderr, or nothing if that is not a terminal."""
    console = _messages()
    if not console.is_terminal:
        yield
        return
    with console.status(escape(text)):
        yield


def progress(items: Sequence[_T], text: str) -> Iterator[_T]:
    """Yield the items under a progress bar on stderr, or without one if that is not a terminal."""
    with _bar() as bar:
        yield from bar.track(items, description=escape(text))


@contextmanager
def steps(text: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that moves a progress bar, as `progress` has it, to (done, all)."""
    with _bar() as bar:
        task = bar.add_task(escape(text), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar() -> Progress:
    console = _messages()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def command_line(*words: str | Path) -> str:
    """Return a command to copy into a shell."""
    return shlex.join(["biper", *map(str, words)])
