"""The GPU check's runner: limits, verdicts, and results that survive a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gpu import report
from gpu.processes import start, stop
from gpu.record import RESULTS, append, read
from gpu.runner import NAMES, ROOT, SKIPPED, STEPS, Runner, Step

# A step: `fake WORD ...`, where each word is something to do.
FAKE = """
import os, signal, sys, time
from gpu.record import append

for word in sys.argv[1:]:
    if word == "measure":
        append("ceiling", name="copy_bytes", rate=1e12)
    elif word == "hang":
        time.sleep(60)
    elif word.startswith("kill"):
        os.kill(os.getppid() if word == "kill-runner" else os.getpid(), signal.SIGKILL)
    elif word.isdigit():
        sys.exit(int(word))
    else:
        print(word, flush=True)
"""
# The runner over fake steps, killed when so many of them have ended.
DRIVER = """
import os, signal, sys
from pathlib import Path
from gpu.runner import Runner, Step

def ended():
    if len(runner.verdicts) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

runner = Runner(Path(os.environ["OUT"]), 60, ended)
runner([
    Step(name=f"s{n}", command=("fake", *words.split()), most_s=30, least_s=0, needs=())
    for n, words in enumerate(sys.argv[2:])
])
"""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of results, with fake steps on the path of Python."""
    (tmp_path / "fake.py").write_text(FAKE, "utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT / "benchmarks")]))
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.setenv("OUT", str(folder))
    return folder


def fake(name: str, *words: str, **more: Any) -> Step:
    options = {"most_s": 30.0, "least_s": 0.0, "needs": ()} | more
    return Step(name=name, command=("fake", *words), **options)


def steps_of(out: Path) -> dict[str, tuple[str, str]]:
    lines = [line for line in read(out) if line["kind"] == "step"]
    return {line["name"]: (line["verdict"], line["told"]) for line in lines}


def driven(killed_behind: int, *words: str) -> int:
    command = [sys.executable, "-c", DRIVER, str(killed_behind), *words]
    return subprocess.run(command, capture_output=True, check=False).returncode


@pytest.mark.parametrize("ended", [1, 2, 3])
def test_a_runner_killed_after_any_step_leaves_a_report_of_what_was_done(
    out: Path, ended: int
) -> None:
    assert driven(ended, "measure one", "measure two 1", "measure three") == -signal.SIGKILL
    verdicts = [("ok", "one"), ("failed", "two"), ("ok", "three")]
    assert list(steps_of(out).values()) == verdicts[:ended]
    assert [line["kind"] for line in read(out)] == ["ceiling", "step"] * ended
    text = report.tables(read(out))
    assert "copy, read and written: 1,000 GB/s" in text
    assert [f"s{n} " in text for n in range(3)] == [n < ended for n in range(3)]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a step outlives its runner")
def test_a_runner_killed_within_a_step_keeps_its_measurements_and_ends_it(out: Path) -> None:
    assert driven(9, "one", "measure kill-runner hang measure") == -signal.SIGKILL
    time.sleep(0.2)
    assert [line["kind"] for line in read(out)] == ["step", "ceiling"]
    assert "copy, read and written" in report.write_text(out)


def test_a_line_is_on_the_disk_at_once_and_one_that_was_cut_off_costs_no_other(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _fd: synced.append((out / RESULTS).read_bytes()))
    append("run", minutes=1)
    assert [json.loads(data) for data in synced] == [{"kind": "run", "minutes": 1}]
    with (out / RESULTS).open("ab") as file:
        file.write(b'{"kind": "ceil')
    append("ceiling", name="b", rate=2.0)
    assert [line.get("name") for line in read(out)] == [None, "b"]
    append("run", minutes=2)  # what was there before is another check's
    assert read(out) == [{"kind": "run", "minutes": 2}]


def test_verdicts_are_of_the_exit_status_and_one_that_fails_stops_no_other(out: Path) -> None:
    runner = Runner(out, 60)
    runner(
        [
            fake("bad", "why", "1"),
            fake("idle", "nothing-here", str(SKIPPED)),
            fake("dies", "so-far", "kill"),
            fake("hangs", "begun", "hang", most_s=1.5),
            fake("mute"),
            fake("lost", needs=("bad",)),
            fake("bare", tool="no-such-program"),
            fake("late", least_s=1000),
            fake("half", least_s=40, share=0.5),
        ]
    )
    told = steps_of(out)
    assert list(told.values())[:7] == [
        ("failed", "why"),
        ("skipped", "nothing-here"),
        ("failed", "ended by signal 9; so-far"),
        ("stopped", "at its limit of 2 s; begun"),
        ("ok", "it printed nothing"),
        ("skipped", "bad was failed"),
        ("skipped", "no-such-program was not found"),
    ]
    assert told["late"][1].startswith("it needs 1000 s, and 5")
    assert told["half"][1].startswith("it needs 40 s, and 2")
    assert runner.verdicts == {name: verdict for name, (verdict, _) in told.items()}
    log = (out / "log.txt").read_text("utf-8")
    assert log.index("===== bad\nwhy") < log.index("===== hangs\nbegun")


def test_a_measuring_step_waits_for_steps_beside_it(out: Path) -> None:
    beside = fake("beside", "hang", beside=True, alone=False, most_s=1.0)
    Runner(out, 60)([beside, fake("build", "built", alone=False), fake("times", "timed")])
    assert list(steps_of(out)) == ["build", "beside", "times"]


def test_a_stopped_step_stops_what_it_started(tmp_path: Path) -> None:
    log, left = tmp_path / "log", tmp_path / "left"
    process = start(["sh", "-c", f"(trap '' TERM; sleep 2; touch {left}) & echo on; wait"], log)
    while not log.read_bytes():
        time.sleep(0.02)
    stop(process)
    time.sleep(2.2)
    assert not left.exists()


def test_the_most_valuable_steps_come_first() -> None:
    assert " ".join(NAMES[:7]) == "machine prepare build tests resnet18 counters compile"
    assert " ".join(NAMES[-5:]) == "ceilings layers sanitizer triton-tests triton"
    for step in STEPS:
        assert (ROOT / "benchmarks" / f"{step.command[0].replace('.', '/')}.py").is_file()
        assert all(NAMES.index(name) < NAMES.index(step.name) for name in step.needs)


def test_the_script_says_what_is_missing_or_means_nothing(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu_check.sh"
    for interpreter, words, status, told in (
        ("/no/such/python", [], 1, "no Python 3.11 or later with torch (tried /no/such/python)"),
        (sys.executable, ["--steps", "layer"], 2, "invalid choice: 'layer'"),
    ):
        variables = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": interpreter}
        command = ["bash", str(script), *words]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert told in done.stderr
    assert not (tmp_path / "out").exists()
