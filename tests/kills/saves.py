"""Kill a process that repeatedly saves engines to the same file."""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from biper_engine import convert, load
from biper_engine.cli.sources import random_network
from biper_engine.engine import Engine
from biper_engine.files import write_atomically
from tests.kills.children import Child, FailedError, leftovers

__all__ = ["SaveTally", "kill_saves"]


@dataclass
class SaveTally:
    """What was found after the kills: how often the one file and the other, and leftovers."""

    found: dict[str, int] = field(default_factory=lambda: {"first": 0, "second": 0})
    left: int = 0

    def __str__(self) -> str:
        return (
            f"{sum(self.found.values())} kills while saving: the file was whole each time, "
            f"{self.found['first']} times the one and {self.found['second']} times the other; "
            f"{self.left} temporary files were left, and the next save removed them"
        )


def kill_saves(count: int, folder: Path, seed: int) -> SaveTally:
    """Kill as often as `count`; half of the children only write, so that kills hit that.

    Raises:
        FailedError: a file was torn or lost, or temporary files were left for good.
    """
    draw, tally, path = random.Random(seed), SaveTally(), folder / "net.biper"
    engines = _engines()
    digests, seconds = {}, 0.0
    for engine, name in zip(engines, tally.found, strict=True):
        start = time.perf_counter()
        engine.save(path)
        seconds = max(seconds, time.perf_counter() - start)
        digests[_digest(path)] = name
    contents = path.read_bytes()

    def save() -> None:
        while True:
            for engine in engines:
                engine.save(path)

    def write() -> None:
        while True:
            write_atomically(path, lambda file: file.write(contents))

    for number in range(count):
        child = Child(write if number % 2 else save, folder / "log")
        if not child.kill_after(draw.uniform(0.0, 4 * seconds)):
            raise FailedError("a child that saves for ever ended")
        found = digests.get(_digest(path))
        if found is None:
            raise FailedError(f"kill {number} tore '{path}' ({path.stat().st_size} bytes)")
        tally.found[found] += 1
        load(path)
        tally.left += len(leftovers(folder))
        if number % 3 == 0:  # others stay for the next child, and add up
            _save_and_look(engines[0], path)
    _save_and_look(engines[1], path)
    return tally


@cache
def _engines() -> list[Engine]:
    names = ("cifar10/resnet20_1w1a", "cifar10/resnet18A_1w1a")
    return [convert(random_network(name), check=False) for name in names]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _save_and_look(engine: Engine, path: Path) -> None:
    engine.save(path)
    if left := leftovers(path.parent):
        raise FailedError(f"temporary files stay after the next save: {left}")
