import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import recording


def test_what_is_recorded_starts_with_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "commit", lambda: "0123abc")
    recording.record({"threads": 2}, tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text("utf-8")
    assert list(json.loads(text).items()) == [("commit", "0123abc"), ("threads", 2)]
    assert text.endswith("}\n")


def test_a_record_that_cannot_be_written_leaves_the_one_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "commit", lambda: "0123abc")
    path = tmp_path / "a.json"
    recording.record({"threads": 2}, path)
    before = path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full"):
        recording.record({"threads": 4}, path)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == {"a.json": before}


def turns(*ratios: float) -> dict[str, Any]:
    """Return what was measured where contestants take so many times their times alone, of 2 ms."""
    contestants = {str(i): {"median_ms": 2.0 * ratio} for i, ratio in enumerate(ratios)}
    return {"batches": [{"contestants": contestants, "alone_ms": dict.fromkeys(contestants, 2.0)}]}


def test_the_disturbance_is_that_of_the_contestant_that_lost_most() -> None:
    assert recording.disturbance(turns(0.5, 1.25, 1.1)) == pytest.approx(0.25)


def test_a_run_whose_disturbance_is_not_known_is_kept_unchanged() -> None:
    counted = {"batches": [{"contestants": {"engine": {"median_images_per_second": 1.0}}}]}
    assert recording.disturbance(counted) is None
    left = iter([counted, turns(1.0)])
    assert recording.least_disturbed(left) is counted
    assert len(list(left)) == 1


def test_a_disturbed_run_is_repeated_and_the_least_disturbed_one_is_kept() -> None:
    left = iter([turns(1.5), turns(1.04), turns(1.0)])
    kept = recording.least_disturbed(left)
    assert kept["batches"] == turns(1.04)["batches"]
    assert kept["disturbance_of_tries"] == pytest.approx([0.5, 0.04])
    assert len(list(left)) == 1
    assert recording.tries_told(kept) == [
        "  try 1: up to 50% slower in turn than alone",
        "  try 2: up to 4% slower in turn than alone",
    ]
    assert recording.tries_told({}) == []
    kept = recording.least_disturbed([turns(1.5), turns(1.2), turns(1.3)])
    assert kept["batches"] == turns(1.2)["batches"]
    assert kept["disturbance_of_tries"] == pytest.approx([0.5, 0.2, 0.3])
