"""The command line: `biper train | convert | verify | run | demo`."""

from biper_engine.cli.app import app, main

__all__ = ["app", "main"]
