"""Steps of the GPU check: limits, verdicts, and processes that end when they must."""

import os
import sys
import time
from pathlib import Path

import gpu
import gpu_steps
import pytest
from gpu_steps import SKIPPED, Group, Outcome, Step, limits, run_stage


def step(name: str, code: str = "", *, limit_s: float = 30.0, reserve_s: float = 0.0) -> Step:
    command = [sys.executable, "-c", code]
    return Step(name=name, command=command, limit_s=limit_s, reserve_s=reserve_s)


def ran(tmp_path: Path, *steps: Step, allowed_s: float = 30.0) -> list[Outcome]:
    told: list[Outcome] = []
    outcomes = run_stage(steps, [allowed_s] * len(steps), tmp_path, tell=told.append)
    assert sorted(told, key=lambda o: o.name) == sorted(outcomes, key=lambda o: o.name)
    return outcomes


def test_a_step_leaves_to_others_what_they_need() -> None:
    stages = [[step("a", limit_s=100)], [step("b", reserve_s=20), step("c", reserve_s=40)]]
    assert limits(stages, 90) == [50]
    assert limits(stages, 500) == [100]
    assert limits(stages[1:], 25) == [25, 25]


def test_a_small_budget_leaves_every_step_a_part() -> None:
    stages = [[step("a")], [step("b", reserve_s=100)]]
    assert limits(stages, 40) == [10]
    assert limits(stages, -1) == [0]


def test_the_exit_status_makes_the_verdict_and_the_last_line_is_told(tmp_path: Path) -> None:
    outcomes = ran(
        tmp_path,
        step("good", "print('some'); print('done'); print()"),
        step("bad", "import sys; print('why'); sys.exit(1)"),
        step("idle", f"import sys; print('not here'); sys.exit({SKIPPED})"),
        step("mute", "import sys; sys.exit(2)"),
    )
    assert [(one.verdict, one.told) for one in outcomes] == [
        ("OK", "done"),
        ("FAILED", "why"),
        ("SKIPPED", "not here"),
        ("FAILED", "it printed nothing"),
    ]
    assert gpu.verdict(outcomes) == (1, "OK: good; FAILED: bad, mute; SKIPPED: idle")
    assert gpu.verdict(outcomes[::2])[0] == 0


def test_a_step_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    code = (
        "import subprocess, sys, time; "
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(child.pid, flush=True); time.sleep(600)"
    )
    (outcome,) = ran(tmp_path, step("hangs", code), allowed_s=3.0)
    assert outcome.verdict == "FAILED"
    assert outcome.told.startswith("stopped at its limit of 3 s; ")
    pid = int((tmp_path / "hangs.log").read_text("utf-8"))
    end = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # ended, though no one has asked for its status yet


@pytest.mark.parametrize("allowed_s", [0.0, 30.0])
def test_a_step_that_never_starts_says_why(tmp_path: Path, allowed_s: float) -> None:
    absent = Step(name="x", command=["/no/such/program"], limit_s=30, reserve_s=0)
    (outcome,) = ran(tmp_path, absent, allowed_s=allowed_s)
    assert outcome.verdict == "FAILED"
    wanted = "/no/such/program" if allowed_s else "the budget leaves no time for it"
    assert wanted in outcome.told


def test_a_crash_is_told_as_such(tmp_path: Path) -> None:
    code = "import os, signal; print('so far', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    (outcome,) = ran(tmp_path, step("dies", code))
    assert (outcome.verdict, outcome.told) == ("FAILED", "ended by signal 9; so far")


def test_a_step_knows_its_limit(tmp_path: Path) -> None:
    (outcome,) = ran(tmp_path, step("x", "import os; print(os.environ['STEP_LIMIT_S'])"))
    assert outcome.told == "30.0"


def test_a_group_that_ended_gives_its_status(tmp_path: Path) -> None:
    group = Group([sys.executable, "-c", "raise SystemExit(7)"], tmp_path / "log")
    assert group.wait(30) == 7
    group.stop()
    group.stop()


def test_one_failing_step_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [[step("first", "raise SystemExit('broken')")], [step("second", "print('fine')")]]
    outcomes = gpu.run(stages, 60.0, tmp_path, tmp_path)
    assert [one.verdict for one in outcomes] == ["FAILED", "OK"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed] == [["first", "FAILED"], ["second", "OK"]]
    log = (tmp_path / gpu.LOG).read_text("utf-8")
    assert log.index("broken") < log.index("===== second")


def test_steps_are_chosen_by_name_and_keep_their_order() -> None:
    chosen = gpu.chosen(["report", "prepare", "machine"])
    assert [[one.name for one in stage] for stage in chosen] == [
        ["machine"],
        ["prepare"],
        ["report"],
    ]
    with pytest.raises(ValueError, match="STEPS has layer; the steps are machine build"):
        gpu.chosen(["layer"])


def test_every_step_has_a_script_and_the_budget_holds_all_reserves() -> None:
    for stage in gpu.STAGES:
        assert all(Path(one.command[-1]).is_file() for one in stage)
    reserves = sum(max(one.reserve_s for one in stage) for stage in gpu.STAGES)
    assert reserves < gpu.BUDGET_S < 600


def test_steps_use_this_checkout_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    paths = gpu.environment(Path("/work"))["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(gpu.ROOT), str(gpu.BENCHMARKS), "/elsewhere"]
    assert gpu_steps.python("x")[0] == sys.executable
