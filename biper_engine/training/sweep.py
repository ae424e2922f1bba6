"""One recipe with several values of some settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import Any

from biper_engine.training.config import TrainingConfig
from biper_engine.training.recipe import with_values, yaml_value

__all__ = ["sweep_configs"]


def sweep_configs(config: TrainingConfig, axes: Sequence[str]) -> dict[str, TrainingConfig]:
    """Return the settings of every run of a sweep, by a name that can be a folder's.

    Args:
        config: what the runs have in common.
        axes: `key=value,value`, such as "frequency=5,10,20" or "optimizer.lr=0.1,0.05". With
            several, there is a run for each combination.

    Raises:
        ValueError: a key is unknown (the message has the nearest one) or given twice, a value has
            another type, is out of range or comes twice, or there is none.
    """
    parsed = [_axis(axis) for axis in axes]
    keys = [key for key, _ in parsed]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"The sweep has '{twice}' twice. Put all of its values into one of them.")
    found: dict[str, TrainingConfig] = {}
    for values in product(*(values for _, values in parsed)):
        chosen = dict(zip(keys, values, strict=True))
        name = ",".join(f"{key}={_text(value)}" for key, value in chosen.items())
        run = with_values(config, chosen, "The sweep")
        if name in found or run in found.values():
            raise ValueError(f"The sweep has {name} twice. Leave one out.")
        found[name] = run
    return found


def _axis(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    where = f"'{text}'"
    if not equals or not values.strip():
        raise ValueError(
            f"{where} is no setting to sweep; wanted key=value,value, as frequency=5,10,20."
        )
    # In brackets, values that are lists keep their commas.
    return key.strip(), list(yaml_value(f"[{values}]", f"The values of {where}"))


def _text(value: Any) -> str:
    """Return a value as a part of a file name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-") or "-"
