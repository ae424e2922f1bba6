"""Several runs side by side: the settings that differ, and what came of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from biper_engine.training.report.run import Run, is_run

__all__ = ["Comparison", "runs_in"]

_SEED = "seed"
_MEASURES: dict[str, Callable[[Run], float | None]] = {
    "stage 1 %": lambda run: _accuracy(run, 0),
    "stage 2 %": lambda run: _accuracy(run, 1),
    "engine %": lambda run: _engine(run),
    "quantization error": lambda run: run.stages[1].error,
    "flips per weight": lambda run: run.stages[1].flips_per_weight,
}
_PLOTTED = {
    "stage 2 %": ("Accuracy", "percent of images right, stage 2"),
    "quantization error": ("Quantization error", "the paper's measure, mean of the layers"),
    "flips per weight": ("Sign flips", "changes of sign per weight in stage 2"),
}


def runs_in(folder: Path) -> list[Path]:
    """Return the folders of runs right in a folder, by name."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if is_run(path)), key=_natural)


def _natural(path: Path) -> list[tuple[float, str]]:
    """Sort numbers in names as numbers."""
    parts = path.name.replace("=", " ").replace(",", " ").split()
    return [(_number(part), part) for part in parts]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.inf
    return value if math.isfinite(value) else math.inf


class Comparison:
    """A table of runs.

    Args:
        runs: at least one.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self._settings = [dict(_flat(run.config.to_dict())) for run in runs]
        first = self._settings[0]
        self.keys = [
            key for key in first if any(one.get(key) != first[key] for one in self._settings)
        ]

    @cached_property
    def values(self) -> list[dict[str, float | None]]:
        """What was measured in each run."""
        return [{name: measure(run) for name, measure in _MEASURES.items()} for run in self.runs]

    @property
    def columns(self) -> list[str]:
        """Headings of `rows`."""
        return [*(self.keys or ["run"]), *_MEASURES, "state"]

    @property
    def rows(self) -> list[list[str]]:
        """A row for each run."""
        return [
            [*self._names(number), *(_told(name, one) for name, one in values.items()), run.state]
            for number, (run, values) in enumerate(zip(self.runs, self.values, strict=True))
        ]

    def _names(self, number: int) -> list[str]:
        if not self.keys:
            return [self.runs[number].path.name]
        return [_text(self._settings[number][key]) for key in self.keys]

    def averages(self) -> tuple[list[str], list[list[str]]] | None:
        """Return headings and rows of means over the seeds, or None if no setting has several."""
        others = [key for key in self.keys if key != _SEED]
        if _SEED not in self.keys:
            return None
        groups: dict[tuple[str, ...], list[int]] = {}
        for number, settings in enumerate(self._settings):
            groups.setdefault(tuple(_text(settings[key]) for key in others), []).append(number)
        if max(map(len, groups.values())) < 2:
            return None
        rows = []
        for names, members in groups.items():
            cells = [self._mean(name, members) for name in _MEASURES]
            rows.append([*names, str(len(members)), *cells])
        return [*others, "seeds", *_MEASURES], rows

    def _mean(self, name: str, members: Iterable[int]) -> str:
        found = [value for one in members if (value := self.values[one][name]) is not None]
        if not found:
            return ""
        mean = _told(name, statistics.mean(found))
        return f"{mean} ± {_told(name, statistics.stdev(found))}" if len(found) > 1 else mean

    def plot(self) -> str:
        """Return a plot if one setting differs, apart from the seed; else nothing."""
        from biper_engine.training.report import figures

        others = [key for key in self.keys if key != _SEED]
        if len(others) != 1:
            return ""
        series: dict[str, dict[Any, list[float]]] = {}
        kinds: dict[str, str] = {}
        for name, (heading, kind) in _PLOTTED.items():
            found: dict[Any, list[float]] = {}
            for settings, values in zip(self._settings, self.values, strict=True):
                if (value := values[name]) is not None:
                    found.setdefault(_hashable(settings[others[0]]), []).append(value)
            if found:
                series[heading], kinds[heading] = found, kind
        return figures.comparison(others[0], series, kinds) if series else ""


def _accuracy(run: Run, stage: int) -> float | None:
    result = run.stages[stage].result
    if result is None:
        return None
    known = (result.validation_accuracy, result.test_accuracy)
    return next((100 * value for value in known if value is not None), None)


def _engine(run: Run) -> float | None:
    if not run.file_is_verified or run.verified is None:
        return None
    accuracy = run.verified.get("accuracy")
    return None if accuracy is None else 100 * float(accuracy)


def _told(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if name.endswith("%") else f"{value:.4f}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
