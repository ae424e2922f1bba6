"""All commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from biper_engine.cli.backends import backends
from biper_engine.cli.bench import bench
from biper_engine.cli.console import show_error
from biper_engine.cli.convert import convert
from biper_engine.cli.demo_command import demo
from biper_engine.cli.export import export
from biper_engine.cli.inspect import inspect
from biper_engine.cli.predict import predict
from biper_engine.cli.report import report
from biper_engine.cli.run import run
from biper_engine.cli.serve import serve
from biper_engine.cli.train import train
from biper_engine.cli.verify import verify
from biper_engine.errors import BiperError

__all__ = ["app", "main"]

app = typer.Typer(
    name="biper",
    help="Run binary neural networks on packed bits.",
    epilog="Start with: [bold]biper demo[/bold]. Each command has examples: biper convert --help",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    demo,
    train,
    report,
    convert,
    verify,
    run,
    predict,
    serve,
    export,
    bench,
    inspect,
    backends,
):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from biper_engine import __version__

        typer.echo(f"biper {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, with any command.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: arguments without the program's name; None takes those of the process.

    Returns:
        0 for success; 1 if the command or a check failed; 2 for wrong usage.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = given[: given.index("--")] if "--" in given else given
    debug = "--debug" in options
    if debug:
        given.remove("--debug")
    try:
        app(args=given, prog_name="biper")
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else int(finished.code is not None)
    except (BiperError, ValueError, OSError, ImportError) as error:
        if debug:
            raise
        show_error(error)
        return 1
    return 0
