"""Print what docs/networks.md and the README say of `frontier.py`'s result, and draw its picture.

    python benchmarks/frontier_report.py

Whatever has a figure, or says which network is the better choice, is made here of the recorded
result, and so is docs/accuracy-latency.png. tests/test_docs.py and tests/test_readme.py hold both
pages to it.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recording import RESULTS, ROOT
from tables import row

__all__ = [
    "PICTURE",
    "RESULT",
    "Network",
    "Result",
    "rounding",
    "sentence",
    "table",
    "verdict",
    "weights",
]

RESULT = RESULTS / "frontier-epyc-zen4.json"
PICTURE = ROOT / "docs" / "accuracy-latency.png"
BITS = "bits"
_RUNS_ON = {BITS: "bits, this engine"}


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network in one precision.

    Attributes:
        network: its name.
        runs: "bits", or the precision of all of it.
        top1: as published, in percent.
        parameters, bytes, binary_macs, float_macs: see `frontier.Entry`.
        ms: median of a call by batch size, where it ran.
        difference: largest of a logit from PyTorch's, over the largest logit; 0 on bits.
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
        """Whether it is no slower and no less accurate, and better in one of the two."""
        mine, theirs = (self.ms[batch], -self.top1), (other.ms[batch], -other.top1)
        return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]

    @property
    def megabytes(self) -> str:
        return f"{self.bytes / 1e6:.1f} MB"

    def __str__(self) -> str:
        return f"{self.network} {'on bits' if self.runs == BITS else f'in {self.runs}'}"


@dataclass(frozen=True)
class Result:
    """All networks, at several batch sizes, and on how many threads."""

    networks: tuple[Network, ...]
    batches: tuple[int, ...]
    threads: int

    @classmethod
    def of(cls, values: dict[str, Any]) -> Result:
        """Take what `frontier.py` recorded."""
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
        """Return what ran at a batch size, from the fastest on."""
        found = [network for network in self.networks if batch in network.ms]
        return sorted(found, key=lambda network: network.ms[batch])

    def best(self, batch: int) -> list[Network]:
        """Return those that no other beats, from the fastest on."""
        found = self.ran(batch)
        return [one for one in found if not any(other.beats(one, batch) for other in found)]

    @property
    def best_on_bits(self) -> list[tuple[Network, int]]:
        """Networks on bits that nothing beats, each with its batch size."""
        return [(one, b) for b in self.batches for one in self.best(b) if one.runs == BITS]

    @property
    def on_bits(self) -> list[Network]:
        return [network for network in self.networks if network.runs == BITS]

    def next_above(self, bits: Network) -> list[Network]:
        """Return the least accurate float network with its accuracy or more, in each precision."""
        above = [one for one in self.networks if one.runs != BITS and one.top1 >= bits.top1]
        return [one for one in above if one.top1 == min(other.top1 for other in above)]


def table(result: Result) -> str:
    """Return a row for each network and precision."""
    batches = [f"batch {batch}" for batch in result.batches]
    lines = [
        row("network", "runs on", "top-1 as published", *batches, "weights"),
        row("---", "---", *["--:"] * (len(batches) + 2)),
    ]
    for one in result.networks:
        taken = (f"{one.ms[b]:.2f} ms" if b in one.ms else "did not run" for b in result.batches)
        runs_on = _RUNS_ON.get(one.runs, f"{one.runs}, OpenVINO")
        lines.append(row(one.network, runs_on, f"{one.top1:.1f} %", *taken, one.megabytes))
    return "\n".join(lines)


def verdict(result: Result) -> str:
    """Return which networks to choose, and how those on bits stand beside float ones."""
    chosen = [
        f"at batch {batch} "
        + _joined(f"{one} ({one.top1:.1f} %, {one.ms[batch]:.2f} ms)" for one in result.best(batch))
        for batch in result.batches
    ]
    held = _joined(f"{one.network} at batch {batch}" for one, batch in result.best_on_bits)
    head = (
        f"On bits, {held} are best choices here: nothing that is as accurate is as fast."
        if held
        else "Where the network is yours to choose, choose a float one: every network on bits is "
        "slower here than a float net that is more accurate."
    )
    beside = [_beside_float(result, bits) for bits in result.on_bits if result.next_above(bits)]
    best = f"The best choices, from the fastest on: {'; '.join(chosen)}."
    return " ".join([f"**{head}**", best, *beside])


def _beside_float(result: Result, bits: Network) -> str:
    """Say how long a network on bits takes beside the float one next above it in accuracy."""
    above = result.next_above(bits)
    times = [
        f"{_joined(f'{bits.ms[batch] / one.ms[batch]:.1f}' for batch in one.ms)} times as long as "
        f"{one}"
        for one in above
        if one.ms
    ]
    return (
        f"{bits.network} takes {', '.join(times)} (batch {_joined(map(str, result.batches))}), and "
        f"has {above[0].top1 - bits.top1:.1f} points less."
    )


def weights(result: Result) -> str:
    """Return why it is so, in multiply-accumulates, and what bits bring, in bytes."""
    on_bits, above = result.on_bits, result.next_above(result.on_bits[0])
    plain = above[0]
    work = [
        f"{one.network} takes {_millions(one.float_macs)} in float and "
        f"{_millions(one.binary_macs)} on bits"
        for one in on_bits
    ]
    held = [
        f"{one.network} ({_millions(one.parameters)} parameters) is a file of {one.megabytes}"
        for one in on_bits
    ]
    rivals = [f"{one.megabytes} in {one.runs}" for one in above]
    smallest = min(result.networks, key=lambda one: one.bytes)
    return (
        f"{plain.network} takes {_millions(plain.float_macs)} multiply-accumulates an image; "
        f"{', '.join(work)}. What bits bring is few bytes for many weights: {_joined(held)}; "
        f"{plain.network} ({_millions(plain.parameters)}) takes {_joined(rivals)}. The smallest "
        f"here is {smallest}; {plain.network} in int8, which is not measured here, would take "
        f"{plain.parameters / 1e6:.1f} MB."
    )


def rounding(result: Result) -> str:
    """Return how much bfloat16 changes, and what accuracy it is given."""
    halves = [one for one in result.networks if one.runs == "bfloat16" and one.ms]
    if not halves:
        return "bfloat16 did not run on this machine."
    off = [f"{100 * one.difference:.1f} % for {one.network}" for one in halves]
    return (
        "The paper gives no accuracy in bfloat16, and the plot takes that of float32; with these "
        f"random weights logits differ by up to {_joined(off)}, of the largest."
    )


def sentence(result: Result) -> str:
    """Return what the README says: one network on bits, and the float one above it."""
    batch, bits = result.batches[0], result.on_bits[0]
    above = result.next_above(bits)
    head = (
        "At equal accuracy the rivals are float nets made for speed"
        if result.best_on_bits
        else "At equal accuracy a float net made for speed is the better choice on this machine"
    )
    taken = [f"{one.ms[batch]:.2f} ms in {one.runs}" for one in above if batch in one.ms]
    return (
        f"{head}: {above[0].network}, {above[0].top1:.1f} % top-1 as published, takes "
        f"{_joined(taken)} at batch {batch} in OpenVINO; {bits.network} on bits, "
        f"{bits.top1:.1f} %, takes {bits.ms[batch]:.2f} ms."
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def _joined(words: Iterable[str]) -> str:
    *most, last = list(words) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def main() -> None:
    from frontier_plot import write_plot

    result = Result.read()
    write_plot(result, PICTURE, RESULT)
    pages = {
        "docs/networks.md": [
            table(result),
            *(_filled(told(result)) for told in (rounding, verdict, weights)),
        ],
        "README.md": [_filled(sentence(result))],
    }
    for page, texts in pages.items():
        print(f"For {page}:", *texts, sep="\n\n", end="\n\n")


def _filled(text: str) -> str:
    return textwrap.fill(text, 104, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    main()
