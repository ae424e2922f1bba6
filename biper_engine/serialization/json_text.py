"""JSON in files: one text for each value, and nothing that JSON does not define."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from biper_engine.errors import FileFormatError

__all__ = ["canonical_json", "parse"]


def canonical_json(value: Any) -> str:
    """Return the canonical JSON text of a value.

    Raises:
        FileFormatError: it contains something that JSON cannot represent.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"The engine cannot be saved: its header is not JSON: {error}."
        ) from error


def parse(name: str, text: bytes | str) -> Any:
    """Return the value of a JSON text: no NaN, no infinity, no key twice in an object.

    Args:
        name: name of the file, for messages.
        text: the text in UTF-8.

    Raises:
        FileFormatError: it is not such a text.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode()
        return json.loads(
            decoded,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{name} is damaged: its header is not JSON ({error!s:.200}); copy or save it again."
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is no number")
    return number
