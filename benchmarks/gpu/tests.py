"""The steps `tests`, `triton-tests` and `sanitizer`: files of tests, each in its own process.

    python -m gpu.tests cuda|triton|sanitizer

A kernel that breaks the GPU's context breaks it for only one file. Results are recorded test by
test, so that a file that is stopped loses none.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import TimeoutExpired
from time import monotonic
from typing import NamedTuple

from gpu.processes import find_tool, last_line, python, start, stop
from gpu.record import append, file_results, read
from gpu.target import ROOT, Skipped, Target, Wrong, output_of, run_step, step_seconds, work_folder

AT_ONCE = max(1, min(6, (os.cpu_count() or 1) // 2))
CLOSING_S = 6.0
NOTHING_SELECTED = 5
# Emulated backends are among the deep tests; `gpu.select_tests` leaves them out on a GPU.
OPTIONS = ("--no-header", "-q", "-rf", "-m", "", "-p", "no:benchmark", "-p", "no:cacheprovider")
TOOLS = ("memcheck", "racecheck", "synccheck")
WATCHED = ("tests/ops/test_cuda.py", "tests/ops/test_stem.py")
FILTERS = ("--kernel-name", "--kernel-regex")
NAMESPACE = "biper"  # namespace of all our kernels
FOUND = 9  # exit status of a tool that found an error
_ON_BACKENDS = re.compile(r"def test_\w+\([^)]*\b(backend|device|run|cuda)\b")


class Job(NamedTuple):
    """A file of tests, the backend whose tests run, the checking tool, and its command."""

    path: Path
    backend: str
    under: str = ""
    prefix: Sequence[str] = ()


def run(job: Job, end: float) -> str:
    """Run a job until a time of `monotonic`; return the reason if it did not end well."""
    log = work_folder() / f"{job.backend}-{job.path.stem}-{job.under}.log"
    log.unlink(missing_ok=True)
    variables = {"BIPER_GPU_BACKEND": job.backend, "BIPER_GPU_UNDER": job.under}
    variables["OMP_NUM_THREADS"] = "2"
    if job.under == "memcheck":  # each tensor is its own allocation, so that overruns are found
        variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    why = "not started, since the time was over"
    if monotonic() < end:
        command = python(
            *("pytest", "-p", "gpu.select_tests", *OPTIONS, f"--rootdir={ROOT}", str(job.path))
        )
        process = start([*job.prefix, *command], log, variables)
        with suppress(TimeoutExpired):
            process.wait(end - monotonic())
        status = process.poll()
        stop(process)
        print(f"----- {job.path.name} {job.under}\n{log.read_bytes().decode(errors='replace')}")
        if status in (0, 1, NOTHING_SELECTED):
            return ""
        how = "stopped at the limit" if status is None else f"ended with {status}"
        why = f"{how}; {last_line(log)}"
    file = str(job.path.relative_to(ROOT))
    append("tests", file=file, backend=job.backend, under=job.under, problem=why)
    return f"{job.path.name} {job.under}".rstrip() + f": {why}"


def verdict(jobs: Sequence[Job]) -> str:
    """Run jobs in the step's time, some in parallel, and return a summary.

    Raises:
        Wrong: a test failed, or a file did not end well.
        Skipped: no test ran.
    """
    end = monotonic() + step_seconds(150) - CLOSING_S
    with ThreadPoolExecutor(AT_ONCE) as pool:
        problems = [why for why in pool.map(partial(run, end=end), jobs) if why]
    whose = {(job.backend, job.under) for job in jobs}
    found = [one for one in file_results(read(Path(os.environ["OUT"]))) if one.whose in whose]
    failed = [name for one in found for name in one.failed]
    passed = sum(one.passed for one in found)
    told = f"{passed} passed, {len(failed)} failed in {sum(one.passed > 0 for one in found)} files"
    told = "; ".join([told, *(f"failed: {name}" for name in failed[:1]), *problems])
    if failed or problems:
        raise Wrong(told)
    if not passed:
        raise Skipped(f"no test of {jobs[0].backend} ran")
    return told


def files(folder: Path) -> list[Path]:
    """Return the files with tests of every backend's operators or tests for a GPU, long ones first.

    `select_tests` decides which of their tests run.
    """
    found = []
    for path in sorted(folder.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.gpu" in text or (path.parent.name == "ops" and _ON_BACKENDS.search(text)):
            found.append(path)
    return sorted(found, key=lambda path: -path.stat().st_size)


def only_ours(program: str) -> list[str]:
    """Return options of a tool that exclude other kernels than ours; none if it has no such."""
    for part in re.split(r"\n(?= {0,4}-)", output_of(program, "--help")):
        option = part.split()[0] if part.strip() else ""
        if option in FILTERS and "kernel_substring" in part:
            return [option, f"kernel_substring={NAMESPACE}"]
    return []


def watched() -> list[Job]:
    """Return the tests of kernels under each tool.

    Raises:
        Skipped: compute-sanitizer was not found.
    """
    program = find_tool("compute-sanitizer")
    if program is None:
        raise Skipped("compute-sanitizer was not found")
    prefix = [program, f"--error-exitcode={FOUND}", "--print-limit=20", *only_ours(program)]
    print(f"checked by: {' '.join(prefix)}")
    pairs = [(ROOT / file, tool) for file in WATCHED for tool in TOOLS]
    return [Job(path, "cuda", tool, [*prefix, f"--tool={tool}"]) for path, tool in pairs]


def work(_here: Target) -> str:
    backend = sys.argv[1]
    if backend == "sanitizer":
        return verdict(watched())
    return verdict([Job(path, backend) for path in files(ROOT / "tests")])


if __name__ == "__main__":
    sys.exit(run_step(work))
