"""Results of `frontier.py`: networks with their accuracies, times and sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recording import RESULTS

__all__ = ["BITS", "RESULT", "Network", "Result"]

RESULT = RESULTS / "frontier-xeon.json"
BITS = "bits"


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network in one precision.

    Attributes:
        network: its name.
        runs: "bits", or the precision of the whole network.
        top1: published accuracy, in percent.
        parameters, bytes, binary_macs, float_macs: see `frontier.Entry`.
        ms: median time of a call, for each batch size at which it ran.
        difference: largest difference of a logit from PyTorch's, over the largest logit; 0 on bits.
    """

    network: str
    runs: str
    top1: float
    parameters: int
    bytes: int
    binary_macs: int
    float_macs: int
    ms: dict[int, float]
    difference: float

    def beats(self, other: Network, batch: int) -> bool:
        """Whether it is at least as fast and as accurate, and better in one of the two."""
        mine, theirs = (self.ms[batch], -self.top1), (other.ms[batch], -other.top1)
        return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]

    @property
    def megabytes(self) -> str:
        return f"{self.bytes / 1e6:.1f} MB"

    def __str__(self) -> str:
        return f"{self.network} {'on bits' if self.runs == BITS else f'in {self.runs}'}"


@dataclass(frozen=True)
class Result:
    """All networks, at several batch sizes, and the number of threads."""

    networks: tuple[Network, ...]
    batches: tuple[int, ...]
    threads: int

    @classmethod
    def of(cls, values: dict[str, Any]) -> Result:
        """Create a result from a file of `frontier.py`."""
        fields = ("network", "runs", "top1", "parameters", "bytes", "binary_macs", "float_macs")
        networks = [
            Network(
                **{field: entry[field] for field in fields},
                ms={
                    contest["batch"]: contest["contestants"][name]["median_ms"]
                    for contest in values["batches"]
                    if name in contest["contestants"]
                },
                difference=max(
                    contest["largest_relative_difference"].get(name, 0.0)
                    for contest in values["batches"]
                ),
            )
            for name, entry in values["networks"].items()
        ]
        batches = tuple(contest["batch"] for contest in values["batches"])
        return cls(tuple(networks), batches, values["threads"])

    @classmethod
    def read(cls, path: Path = RESULT) -> Result:
        return cls.of(json.loads(path.read_text(encoding="utf-8")))

    def ran(self, batch: int) -> list[Network]:
        """Return the networks that ran at a batch size, fastest first."""
        found = [network for network in self.networks if batch in network.ms]
        return sorted(found, key=lambda network: network.ms[batch])

    def best(self, batch: int) -> list[Network]:
        """Return the networks that no other beats, fastest first."""
        found = self.ran(batch)
        return [one for one in found if not any(other.beats(one, batch) for other in found)]

    @property
    def best_on_bits(self) -> list[tuple[Network, int]]:
        """Networks on bits that no other beats, each with its batch size."""
        return [(one, b) for b in self.batches for one in self.best(b) if one.runs == BITS]

    @property
    def on_bits(self) -> list[Network]:
        return [network for network in self.networks if network.runs == BITS]

    def next_above(self, bits: Network) -> list[Network]:
        """Return the least accurate float network with at least its accuracy, in each precision."""
        above = [one for one in self.networks if one.runs != BITS and one.top1 >= bits.top1]
        return [one for one in above if one.top1 == min(other.top1 for other in above)]
