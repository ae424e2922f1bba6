"""benchmarks/gpu_check.sh as a user calls it, where there is no GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch

SCRIPT = gpu.BENCHMARKS / "gpu_check.sh"
SASS = ("sm_80", "sm_90")


def check(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT)],
        cwd=out.parent,
        env={**os.environ, "OUT": str(out), **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_python_that_has_torch_it_says_what_to_do(tmp_path: Path) -> None:
    done = check(tmp_path / "out", PYTHON="/no/such/python")
    assert done.returncode == 1
    assert "no Python 3.11 or later with torch (tried /no/such/python)" in done.stderr


def test_steps_and_budgets_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    done = check(tmp_path / "out", PYTHON=sys.executable, STEPS="layer")
    assert done.returncode == 2
    assert "STEPS has layer; the steps are machine" in done.stderr
    done = check(tmp_path / "out", PYTHON=sys.executable, BUDGET_S="soon")
    assert done.returncode == 2
    assert "soon" in done.stderr


@pytest.mark.deep
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_step_says_so_and_none_ends_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIGITS", raising=False)
    steps = "machine tests sanitizer ceilings layers networks digits report"
    out = tmp_path / "out"
    done = check(out, PYTHON=sys.executable, STEPS=steps, BUDGET_S="540")
    assert done.returncode == 1
    lines = done.stdout.splitlines()[: len(steps.split())]
    assert [line.split()[0] for line in lines] == steps.split()
    for line in lines[:6]:
        assert line.split()[1] == "FAILED"
        assert "no GPU: torch" in line
    assert "SKIPPED" in lines[6]
    assert "DIGITS names no network" in lines[6]
    assert lines[7].split()[1] == "OK"
    log = (out / gpu.LOG).read_text("utf-8")
    assert "Traceback" not in log + done.stdout + done.stderr
    values = json.loads((out / "results.json").read_text("utf-8"))
    assert values["machine"]["torch"] == torch.__version__
    assert len(list(out.iterdir())) <= 8


def disassembled(arch: str, folder: Path) -> dict[str, str]:
    """Compile peak.cu and return each kernel's machine code by its name."""
    made = folder / f"{arch}.o"
    source = gpu.ROOT / "csrc" / "cuda" / "peak.cu"
    command = ["nvcc", "-c", "-std=c++17", "-fmad=false", f"-arch={arch}", str(source)]
    subprocess.run([*command, "-o", str(made)], check=True, capture_output=True)
    dump = subprocess.run(
        [str(cuobjdump()), "-sass", str(made)], check=True, capture_output=True, text=True
    ).stdout
    parts = dump.split("Function : ")[1:]
    return {part.splitlines()[0]: part for part in parts}


def cuobjdump() -> str | None:
    """Return the disassembler of CUDA, or of Triton, which brings one."""
    if shutil.which("cuobjdump"):
        return shutil.which("cuobjdump")
    folders = [Path(path, "triton/backends/nvidia/bin/cuobjdump") for path in sys.path]
    return next((str(path) for path in folders if path.is_file()), None)


@pytest.mark.deep
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.skipif(cuobjdump() is None, reason="there is no cuobjdump")
@pytest.mark.parametrize("arch", SASS)
def test_the_loops_of_the_peaks_are_the_instruction_and_nothing_else(
    arch: str, tmp_path: Path
) -> None:
    code = disassembled(arch, tmp_path)
    wanted = {
        "peak_binary": "BMMA.168256.AND.POPC",
        "peak_int8": "IMMA.16832.U8.U8",
        "peak_half": "HMMA.16816.F32",
        "peak_popcount": "POPC ",
    }
    for kernel, instruction in wanted.items():
        (text,) = [part for name, part in code.items() if kernel in name]
        assert text.count(instruction) == 32, kernel  # of eight chains, unrolled four times
        assert not any(memory in text for memory in ("LDG", "STG", "LDL", "STL", "LDS", "STS"))
