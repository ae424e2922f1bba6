"""The soak test: its criteria, and a short run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from biper_engine import backends
from tests.soak import watch
from tests.soak.subjects import Batch, DifferenceError, Subject, difference

ROOT = Path(__file__).resolve().parent.parent.parent
NETWORK = "cifar10/resnet20_1w1a"


def test_growth_is_that_of_the_medians_of_thirds() -> None:
    assert watch.growth([1.0, 90.0, 1.0, 1.0, 1.0, 2.0]) == 1.5 - 45.5
    assert watch.growth([1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0]) == 0.0
    assert watch.growth([1.0, 2.0, 3.0]) == 2.0
    with pytest.raises(ValueError, match="Three rounds"):
        watch.growth([1.0, 2.0])


def test_a_steady_leak_is_reported_and_noise_is_not() -> None:
    def rounds(step_mb: float, files: int) -> list[watch.Holding]:
        return [
            watch.Holding(100 + (i % 2) * 3, 20 + step_mb * i, 7 + i % 2, 9 + files * i)
            for i in range(12)
        ]

    assert watch.complaints(watch.growths(rounds(0.0, 0))) == []
    leaks = watch.complaints(watch.growths(rounds(1.0, 1)))
    assert [leak.partition(" grew")[0] for leak in leaks] == ["allocated memory (MB)", "open files"]


def test_the_least_of_a_round_counts() -> None:
    phases = [watch.Holding(9.0, 2.0, 5, 4), watch.Holding(7.0, 3.0, 6, 3)]
    assert watch.least(phases) == watch.Holding(7.0, 2.0, 5, 3)


def test_a_row_with_another_byte_is_a_difference() -> None:
    wanted = torch.tensor([[0.0, 1.0], [float("nan"), 2.0]])
    assert difference(wanted.clone(), wanted) is None
    got = wanted.clone()
    got[0, 0] = -0.0
    assert difference(got, wanted) == "rows [0] of 2 differ, by up to nan"
    assert difference(wanted.double(), wanted) is not None


@pytest.mark.deep
def test_a_subject_refuses_other_logits(tmp_path: Path) -> None:
    subject = Subject(NETWORK, tmp_path, (1,))
    batch = Batch((0, 3, 3), "strided")
    logits = subject.engine(subject.input(batch))
    subject.check(batch, logits)
    with pytest.raises(DifferenceError, match=r"a batch of 3, strided: rows \[1, 2\]"):
        subject.check(batch, logits[[0, 0, 0]])


@pytest.mark.parametrize(
    ("minutes", "phase_seconds", "phases"),
    [
        pytest.param("0.25", "0.4", "36 phases", marks=pytest.mark.weekly),
        pytest.param("60", None, "phases", marks=pytest.mark.weekly),
    ],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the soak reads /proc")
@pytest.mark.skipif(
    not any(info.name == "cpu" and info.available for info in backends()),
    reason="the cpu backend does not run here",
)
def test_a_soak_finds_nothing(minutes: str, phase_seconds: str | None, phases: str) -> None:
    options = ["--minutes", minutes]
    if phase_seconds is not None:
        options += ["--phase-seconds", phase_seconds, "--networks", NETWORK]
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", *options],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        timeout=300 + 90 * float(minutes),
        check=False,
    )
    said = done.stdout + done.stderr
    assert phases in done.stdout, said
    assert "every byte as at the start" in done.stdout, said
    assert done.returncode == 0, said
