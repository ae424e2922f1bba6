"""Environment variables that every call looks at."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["Variable"]

# What `os.environ` keeps its values in, encoded as the system has them.
_VALUES: Any = getattr(os.environ, "_data", os.environ)


class Variable:
    """An environment variable, which is usually not set.

    `os.environ` raises and catches a KeyError where one is missing: 0.7 us on a Zen 4, and 1.8 us
    once a network has run through the caches. So the dict behind it is asked first. Another object
    in the place of `os.environ` is not seen.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._key = name if _VALUES is os.environ else os.environ.encodekey(name)

    def get(self) -> str | None:
        """Return the value that it has now; None where it is empty or missing."""
        if self._key not in _VALUES:
            return None
        return os.environ.get(self._name) or None
