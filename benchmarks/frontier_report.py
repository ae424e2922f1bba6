"""Print the texts of docs/choose.md and the README on `frontier.py`'s result, and plot it.

    python benchmarks/frontier_report.py

All figures, statements about the better choice, and docs/accuracy-latency.png are made here from
the recorded result. tests/test_docs.py and tests/test_readme.py compare both pages with it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from frontier_plot import write_plot
from frontier_result import BITS, RESULT, Network, Result
from recording import ROOT
from tables import row

__all__ = ["PICTURE", "rounding", "sentence", "table", "verdict", "weights"]

PICTURE = ROOT / "docs" / "accuracy-latency.png"
_MACS = ("MACs on bits", "MACs in float")
_RUNS_ON = {BITS: "bits, this engine"}


def table(result: Result) -> str:
    """Return a row for each network and precision."""
    batches = [f"batch {batch}" for batch in result.batches]
    lines = [
        row("network", "runs on", "top-1 as published", *batches, "weights", *_MACS),
        row("---", "---", *["--:"] * (len(batches) + 4)),
    ]
    for one in result.networks:
        taken = (f"{one.ms[b]:.2f} ms" if b in one.ms else "did not run" for b in result.batches)
        runs_on = _RUNS_ON.get(one.runs, f"{one.runs}, OpenVINO")
        macs = (_millions(one.binary_macs) if one.runs == BITS else "-", _millions(one.float_macs))
        lines.append(row(one.network, runs_on, f"{one.top1:.1f} %", *taken, one.megabytes, *macs))
    return "\n".join(lines)


def verdict(result: Result) -> str:
    """Return which networks to choose, and how those on bits compare with float ones."""
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
    """Return the time of a network on bits relative to the next more accurate float one."""
    above = result.next_above(bits)
    times = []
    for batch in result.batches:
        fastest = min((one for one in above if batch in one.ms), key=lambda one: one.ms[batch])
        ratio = bits.ms[batch] / fastest.ms[batch]
        times.append(f"{ratio:.1f} times as long as in {fastest.runs} at batch {batch}")
    return (
        f"{bits.network} has {above[0].top1 - bits.top1:.1f} points less than {above[0].network}, "
        f"and takes {_joined(times)}."
    )


def weights(result: Result) -> str:
    """Return the savings of bits, in bytes."""
    held = [
        f"{one.network} has {_millions(one.parameters)} parameters in a file of {one.megabytes}"
        for one in result.on_bits
    ]
    smallest = min(result.networks, key=lambda one: one.bytes)
    return (
        f"What bits bring is few bytes for many weights: {_joined(held)}. The smallest here is "
        f"{smallest}, with {_millions(smallest.parameters)} parameters in {smallest.megabytes}."
    )


def rounding(result: Result) -> str:
    """Return how much bfloat16 and int8 change, and the accuracy shown for them."""
    told, timed = [], {one.runs for one in result.networks}
    narrow = [runs for runs in ("bfloat16", "int8") if runs in timed]
    for runs in narrow:
        ran = [one for one in result.networks if one.runs == runs and one.ms]
        off = [f"{100 * one.difference:.1f} % for {one.network}" for one in ran]
        told.append(f"in {runs} by up to {_joined(off)}" if off else f"{runs} did not run here")
    return (
        f"The sources give accuracies in float32, and the plot takes those for {_joined(narrow)}, "
        f"too. With these random weights logits differ, of the largest: {'; '.join(told)}."
    )


def sentence(result: Result) -> str:
    """Return the README's text on one network on bits and the next more accurate float one."""
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
    result = Result.read()
    write_plot(result, PICTURE, RESULT)
    pages = {
        "docs/choose.md": [
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
