"""The steps of `benchmarks/gpu_check.sh`, and what is left of their time.

    python benchmarks/gpu.py --list

See gpu_check.sh for the environment, and benchmarks/README.md for what each step does.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from time import monotonic
from types import FrameType

from gpu_steps import Outcome, Step, limits, python, run_stage

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
WORK = ROOT / "build" / "gpu_check"
BUDGET_S = 560.0
LOG = "log.txt"


def step(
    name: str, script: str, limit_s: float, reserve_s: float, environment: Mapping[str, str] = {}
) -> Step:
    return Step(
        name=name,
        command=python(str(BENCHMARKS / script)),
        limit_s=limit_s,
        reserve_s=reserve_s,
        environment=environment,
    )


# Side by side: what compiles rivals needs neither the extension nor, by then, the whole GPU.
STAGES = (
    (step("machine", "gpu_machine.py", 40, 0),),
    (step("build", "gpu_build.py", 240, 0), step("prepare", "gpu_prepare.py", 150, 0)),
    (step("tests", "gpu_tests.py", 150, 45),),
    (step("sanitizer", "gpu_sanitizer.py", 75, 20),),
    (step("ceilings", "gpu_ceilings.py", 45, 25),),
    (step("layers", "gpu_layers.py", 90, 45),),
    (step("networks", "gpu_networks.py", 600, 140),),
    (step("digits", "gpu_digits.py", 60, 0),),
    (step("report", "gpu_report.py", 60, 25),),
)
NAMES = tuple(one.name for stage in STAGES for one in stage)


def chosen(names: Iterable[str]) -> list[list[Step]]:
    """Return the stages with the steps of these names, in the usual order.

    Raises:
        ValueError: a name is not known.
    """
    wanted = set(names)
    unknown = sorted(wanted - set(NAMES))
    if unknown:
        raise ValueError(f"STEPS has {', '.join(unknown)}; the steps are {' '.join(NAMES)}.")
    stages = ([one for one in stage if one.name in wanted] for stage in STAGES)
    return [stage for stage in stages if stage]


def environment(work: Path) -> dict[str, str]:
    """Return what every step gets: its folders, and caches for compilers beside them."""
    paths = [str(ROOT), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "GPU_RUN": str(work / "run"),
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TRITON_CACHE_DIR": str(work / "triton"),
    }


def run(stages: list[list[Step]], budget_s: float, run_folder: Path, out: Path) -> list[Outcome]:
    """Run all stages, print a line for each step, and gather the logs in one file.

    Args:
        stages: from `chosen`.
        budget_s: seconds for all of them.
        run_folder: of the steps' logs and values.
        out: folder of the log.
    """
    start = monotonic()
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        print(outcome, flush=True)
        text = (run_folder / f"{outcome.name}.log").read_text(encoding="utf-8", errors="replace")
        with (out / LOG).open("a", encoding="utf-8") as log:
            log.write(f"===== {outcome}\n{text}\n")

    for number, stage in enumerate(stages):
        allowed = limits(stages[number:], budget_s - (monotonic() - start))
        outcomes += run_stage(stage, allowed, run_folder, tell=tell)
    return outcomes


def verdict(outcomes: Iterable[Outcome]) -> tuple[int, str]:
    """Return the exit status, and a line that names the steps that failed or were skipped."""
    found: dict[str, list[str]] = {"OK": [], "FAILED": [], "SKIPPED": []}
    for outcome in outcomes:
        found[outcome.verdict].append(outcome.name)
    parts = [f"{word}: {', '.join(names)}" for word, names in found.items() if names]
    return (1 if found["FAILED"] else 0), "; ".join(parts)


def stopped(_number: int, _frame: FrameType | None) -> None:
    sys.exit("gpu_check was told to stop.")


def main(words: list[str]) -> int:
    if words == ["--list"]:
        print("\n".join(NAMES))
        return 0
    try:
        budget_s = float(os.environ.get("BUDGET_S") or BUDGET_S)
        stages = chosen(os.environ.get("STEPS", "").split() or NAMES)
    except ValueError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, stopped)  # a process that exits stops its steps
    out, run_folder = Path(os.environ.get("OUT") or "out").resolve(), WORK / "run"
    shutil.rmtree(run_folder, ignore_errors=True)  # of an earlier check: not to be taken for this
    run_folder.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / LOG).unlink(missing_ok=True)
    os.environ |= {**environment(WORK), "OUT": str(out)}
    os.chdir(ROOT)
    outcomes = run(stages, budget_s, run_folder, out)
    report = run_folder / "report.log"
    if report.exists():
        print(f"\n{report.read_text(encoding='utf-8')}")
    status, line = verdict(outcomes)
    print(f"{line}. The log is {out / LOG}.")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
