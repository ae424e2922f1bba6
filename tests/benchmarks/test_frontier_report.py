"""Texts and plots of a result, from small made-up results."""

from pathlib import Path
from typing import Any

import pytest
from frontier_plot import digest, draw, write_plot
from frontier_report import rounding, sentence, table, verdict, weights
from frontier_result import Result
from PIL import Image

ENTRIES = {
    "B, bits": ("B", "bits", 60.0, 10_000_000, 2_000_000),
    "C, bits": ("C", "bits", 66.0, 20_000_000, 4_000_000),
    "S, float32": ("S", "float32", 64.0, 3_000_000, 12_000_000),
    "S, bfloat16": ("S", "bfloat16", 64.0, 3_000_000, 6_000_000),
    "L, float32": ("L", "float32", 70.0, 5_000_000, 20_000_000),
}
SLOW_BITS = {
    1: {"B, bits": 2.0, "C, bits": 5.0, "S, float32": 1.0, "S, bfloat16": 0.5, "L, float32": 4.0},
    8: {"B, bits": 9.0, "C, bits": 50.0, "S, float32": 6.0, "S, bfloat16": 3.0, "L, float32": 40.0},
}
FAST_BITS = {
    1: {"B, bits": 0.25, "C, bits": 3.0, "S, float32": 1.0, "L, float32": 4.0},
    8: {"B, bits": 6.5, "C, bits": 50.0, "S, float32": 6.0, "L, float32": 40.0},
}


def result(times_ms: dict[int, dict[str, float]]) -> Result:
    networks: dict[str, Any] = {
        name: {
            **{"network": network, "runs": runs, "top1": top1, "parameters": parameters},
            **{"bytes": size, "float_macs": 50_000_000, "how": "", "source": ""},
            "binary_macs": 900_000_000 if runs == "bits" else 0,
        }
        for name, (network, runs, top1, parameters, size) in ENTRIES.items()
    }
    batches = [
        {
            "batch": batch,
            "contestants": {name: {"median_ms": ms} for name, ms in taken.items()},
            "largest_relative_difference": {
                "S, float32": 1e-6,
                "S, bfloat16": 0.02 + 0.001 * batch,
            },
        }
        for batch, taken in times_ms.items()
    ]
    return Result.of({"threads": 2, "networks": networks, "batches": batches})


def names(found: list[Any]) -> list[str]:
    return [str(one) for one in found]


def test_the_best_are_those_that_nothing_beats() -> None:
    slow, fast = result(SLOW_BITS), result(FAST_BITS)
    assert names(slow.best(1)) == names(slow.best(8)) == ["S in bfloat16", "L in float32"]
    assert slow.best_on_bits == []
    assert names(fast.best(1)) == ["B on bits", "S in float32", "C on bits", "L in float32"]
    assert names(fast.best(8)) == ["S in float32", "L in float32"]


def test_equal_ones_are_both_best_and_equally_fast_ones_compare_by_accuracy() -> None:
    equal = result({1: {"S, float32": 1.0, "S, bfloat16": 1.0, "B, bits": 1.0}})
    assert names(equal.best(1)) == ["S in float32", "S in bfloat16"]


def test_the_float_net_beside_bits_is_the_least_accurate_that_is_as_accurate() -> None:
    b, c = result(SLOW_BITS).on_bits
    assert names(result(SLOW_BITS).next_above(b)) == ["S in float32", "S in bfloat16"]
    assert names(result(SLOW_BITS).next_above(c)) == ["L in float32"]


def test_the_table_has_a_row_for_each_and_says_what_did_not_run() -> None:
    lines = table(result(FAST_BITS)).splitlines()
    assert lines[0].startswith("| network | runs on | top-1 as published | batch 1 | batch 8 | we")
    assert lines[0].endswith("| weights | MACs on bits | MACs in float |")
    assert lines[2] == (
        "| B | bits, this engine | 60.0 % | 0.25 ms | 6.50 ms | 2.0 MB | 900.0 M | 50.0 M |"
    )
    assert lines[5] == (
        "| S | bfloat16, OpenVINO | 64.0 % | did not run | did not run | 6.0 MB | - | 50.0 M |"
    )
    assert len(lines) == 2 + len(ENTRIES)


def test_where_float_nets_win_the_verdict_says_so_plainly() -> None:
    text = verdict(result(SLOW_BITS))
    assert text.startswith("**Where the network is yours to choose, choose a float one: every ")
    assert "at batch 1 S in bfloat16 (64.0 %, 0.50 ms) and L in float32 (70.0 %, 4.00 ms); " in text
    assert (
        "B has 4.0 points less than S, and takes 4.0 times as long as in bfloat16 at batch 1 and "
        "3.0 times as long as in bfloat16 at batch 8." in text
    )
    assert "C has 4.0 points less than L, and takes 1.2 times as long as in float32" in text
    assert "a float net made for speed is the better choice" in sentence(result(SLOW_BITS))


def test_where_bits_win_the_verdict_says_where() -> None:
    text = verdict(result(FAST_BITS))
    assert text.startswith("**On bits, B at batch 1 and C at batch 1 are best choices here: ")
    assert "choose a float one" not in text
    assert "and takes 0.2 times as long as in float32 at batch 1 and 1.1 times as long" in text
    assert "bfloat16" not in text
    said = sentence(result(FAST_BITS))
    assert said == (
        "At equal accuracy the rivals are float nets made for speed: S, 64.0 % top-1 as published, "
        "takes 1.00 ms in float32 at batch 1 in OpenVINO; B on bits, 60.0 %, takes 0.25 ms."
    )


def test_bits_that_no_float_net_equals_are_compared_with_none() -> None:
    alone = {1: {"B, bits": 2.0, "C, bits": 3.0, "S, float32": 1.0}}
    found = result(alone)
    lower = Result(
        tuple(one for one in found.networks if one.network != "L"), found.batches, found.threads
    )
    text = verdict(lower)
    assert "B has 4.0 points less than S, and takes 2.0 times as long as in float32 at" in text
    assert "C has" not in text


def test_bytes_are_compared_with_the_smallest_named() -> None:
    text = weights(result(SLOW_BITS))
    assert "B has 10.0 M parameters in a file of 2.0 MB and C has 20.0 M parameters in a " in text
    assert text.endswith("The smallest here is B on bits, with 10.0 M parameters in 2.0 MB.")


def test_the_largest_difference_in_bfloat16_is_reported() -> None:
    assert rounding(result(SLOW_BITS)).endswith("largest: in bfloat16 by up to 2.8 % for S.")
    assert rounding(result(FAST_BITS)).endswith("largest: bfloat16 did not run here.")


@pytest.mark.parametrize("times_ms", [SLOW_BITS, FAST_BITS], ids=["slow", "fast"])
def test_the_picture_has_a_panel_for_each_batch_with_every_network(
    times_ms: dict[int, dict[str, float]],
) -> None:
    panels = draw(result(times_ms)).axes
    assert [axes.get_title("left").strip() for axes in panels] == ["Batch 1", "Batch 8"]
    for axes, taken in zip(panels, times_ms.values(), strict=True):
        places = [tuple(place) for dots in axes.collections for place in dots.get_offsets()]
        assert sorted(places) == sorted((ms, ENTRIES[name][2]) for name, ms in taken.items())
        words = {text.get_text() for text in axes.texts}
        assert {ENTRIES[name][0] for name in taken} <= words
        assert axes.get_xscale() == "log"


def test_the_line_goes_through_the_best_and_to_the_right_edge() -> None:
    axes = draw(result(FAST_BITS)).axes[0]
    (line,) = axes.lines
    assert line.get_drawstyle() == "steps-post"
    assert list(line.get_xdata()) == [0.25, 1.0, 3.0, 4.0, axes.get_xlim()[1]]
    assert list(line.get_ydata()) == [60.0, 64.0, 66.0, 70.0, 70.0]


def test_a_picture_tells_which_file_it_was_made_from(tmp_path: Path) -> None:
    source = tmp_path / "result.json"
    source.write_text("{}")
    write_plot(result(SLOW_BITS), tmp_path / "a.png", source)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1500, 750)
        assert picture.info["Source"] == digest(source)
    before = digest(source)
    source.write_text("[]")
    assert digest(source) != before
