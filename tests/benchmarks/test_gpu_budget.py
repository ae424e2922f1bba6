"""What fits into a time is done in its order, and what does not is named."""

import pytest
from gpu_budget import Deadline, Job, do


class Clock:
    """A clock that jobs move."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_jobs_that_no_longer_fit_are_skipped_aloud_and_smaller_ones_still_done() -> None:
    clock, done, told = Clock(), [], []

    def job(name: str, needs_s: float, takes_s: float) -> Job:
        def run() -> None:
            done.append(name)
            clock.seconds += takes_s

        return Job(name=name, needs_s=needs_s, run=run)

    jobs = [job("first", 5, 7), job("long", 20, 0), job("short", 2, 2), job("late", 2, 0)]
    skipped = do(jobs, Deadline(10, clock), tell=told.append)
    assert done == ["first", "short"]
    assert skipped == {
        "long": "needs 20 s, 3 s were left",
        "late": "needs 2 s, 1 s were left",
    }
    assert told == [f"SKIPPED {name}: {why}" for name, why in skipped.items()]


def test_a_step_ends_before_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEP_LIMIT_S", "50.0")
    assert 40 < Deadline.of_step(1000).left_s() < 50
    monkeypatch.delenv("STEP_LIMIT_S")
    assert 990 < Deadline.of_step(1000).left_s() < 1000
