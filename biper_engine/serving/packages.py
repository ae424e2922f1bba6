"""Packages of the extra `serve`, which are imported when they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["require_package"]


def require_package(name: str, purpose: str) -> Any:
    """Import a package.

    Raises:
        ImportError: it cannot be imported; the message has the command that installs it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs '{name.partition('.')[0]}', which cannot be imported: {error}. "
            'Run: pip install "biper-engine[serve]"'
        ) from error
