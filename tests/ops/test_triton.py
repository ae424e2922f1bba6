"""The Triton backend without a GPU: when it runs, and the operator matrix in its interpreter.

TRITON_INTERPRET must be set before Triton is loaded, so the matrix runs in a process of its own.
`make test-deep` runs a few cases of every kernel there, and `make test-weekly` all. Triton 3.6.0 is
the oldest version supported, and 3.7.1, pinned in constraints.txt, the newest.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from biper_engine.geometry import Conv2dGeometry
from biper_engine.ops import triton as adapter
from biper_engine.ops.backends import backends, by_name, select, use_backend
from biper_engine.ops.triton import TritonBackend
from tests.shared import triton_is_interpreted

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
outside = pytest.mark.skipif(
    bool(os.environ.get("TRITON_INTERPRET")), reason="starts the interpreter itself"
)

RUN = "triton-cpu"
INTERPRETED = {"TRITON_INTERPRET": "1"}
USUAL = "not deep and not weekly"
KERNELS = [f"tests/kernels/{name}.py" for name in ("test_kernels", "test_float_kernels")]
OPS = "tests/ops"
EVERY_STEP = "test_every_step_is_rounded_once_and_in_order"
FEW = [
    f"{OPS}/test_binarize.py::test_threshold_and_sense_act_per_channel[{RUN}-33]",
    f"{OPS}/test_binarize.py::test_zeros_denormals_infinities_and_nan[{RUN}]",
    f"{OPS}/test_binarize.py::test_unbinarize_gives_signs_in_channels_last[{RUN}-65-dtype2]",
    f"{OPS}/test_bmaxpool2d.py::test_padding_never_wins[{RUN}-True]",
    f"{OPS}/test_bmaxpool2d.py::test_unused_bits_do_not_change_the_result[{RUN}]",
    *(
        f"{OPS}/test_bconv2d.py::test_unused_bits_and_prepacked_weights_do_not_change_the_result[{RUN}-{case}]"
        for case in ("65 filters", "everything", "depthwise")
    ),
    f"{OPS}/test_epilogue.py::test_the_fma_is_rounded_once_where_twice_would_differ[{RUN}-1.0]",
    f"{OPS}/test_epilogue.py::test_signed_zeros_survive_clamp_slope_and_shift[{RUN}]",
    f"{OPS}/test_epilogue.py::{EVERY_STEP}[{RUN}-2x2-prelu-bfloat16]",
]
REST = [f"{OPS}/test_{name}.py" for name in ("binarize", "bmaxpool2d", "bconv2d", "epilogue")]


def run(
    variables: dict[str, str], *arguments: str, marks: str = "", folder: Path | None = None
) -> tuple[str, int]:
    """Run tests in a process of their own, with the Triton in a folder where one is given."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    if folder is not None:
        variables = variables | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:xdist"),
            *("-p", "no:cacheprovider", "-m", marks, *arguments),
        ],
        cwd=ROOT,
        env=kept | variables | {"OMP_NUM_THREADS": "1", "CI": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert "skipped" not in summary, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None, summary
    return done.stdout, int(passed.group(1))


@needs_triton
@outside
@pytest.mark.deep
def test_a_few_cases_of_every_operator_are_exact_in_the_interpreter() -> None:
    output, passed = run(INTERPRETED, *FEW, marks=USUAL)
    assert passed == len(FEW), output


@needs_triton
@outside
@pytest.mark.weekly
def test_the_operator_matrix_is_exact_in_the_interpreter() -> None:
    _, passed = run(INTERPRETED, *REST, *KERNELS, "-k", f"kernels or {RUN}", marks="")
    assert passed > 300


@outside
@pytest.mark.weekly
def test_the_oldest_version_computes_and_compiles_the_same() -> None:
    folder = Path(sys.prefix, "oldest-triton")
    if not (folder / "triton").is_dir():
        pytest.skip(f"{folder} has no Triton; make test-weekly puts it there")
    output, passed = run(INTERPRETED, *FEW, *KERNELS, marks=USUAL, folder=folder)
    assert passed > len(FEW), output
    _, passed = run({}, "tests/kernels/test_compile.py", "-k", "sm_90 or gfx942", folder=folder)
    assert passed == 2


# -- when it runs ---------------------------------------------------------------------------------


def test_the_reason_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    adapter._load_failure.cache_clear()
    adapter._unavailable_reason.cache_clear()
    try:
        assert TritonBackend().unavailable_reason() == (
            "triton is not installed; pip install triton (Linux only)"
        )
    finally:
        adapter._load_failure.cache_clear()
        adapter._unavailable_reason.cache_clear()


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_available_in_the_interpreter_only() -> None:
    row = {info.name: info for info in backends()}["triton"]
    assert row.available == triton_is_interpreted()
    if not row.available:
        assert row.reason is not None
        assert "TRITON_INTERPRET=1" in row.reason


@pytest.mark.skipif(triton_is_interpreted(), reason="the interpreter takes CPU tensors")
def test_it_runs_on_gpus_only() -> None:
    backend = TritonBackend()
    assert backend.unsupported_reason("binarize", None, CUDA) is None
    for device in (CPU, META):
        reason = backend.unsupported_reason("binarize", None, device)
        assert reason is not None
        assert "it runs on GPUs" in reason


@needs_triton
@pytest.mark.parametrize(
    ("capability", "served"), [(75, False), (80, True), (120, True), (0, True)]
)
def test_a_gpu_that_triton_does_not_compile_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: int, served: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(adapter._kernels("launch"), "capability", lambda device: capability)
    adapter._capability_reason.cache_clear()
    try:
        reason = adapter._capability_reason(CUDA)
    finally:
        adapter._capability_reason.cache_clear()
    refusal = "Triton needs compute capability 8.0 or later, cuda has 7.5"
    assert reason == (None if served else refusal)


@pytest.mark.skipif(not triton_is_interpreted(), reason="needs TRITON_INTERPRET=1")
def test_the_interpreter_runs_only_if_it_is_forced() -> None:
    reason = by_name("triton").unsupported_reason("binarize", None, CPU)
    assert reason == "Triton's interpreter runs only if this backend is forced"
    assert select("binarize", None, CPU).name != "triton"
    with use_backend("triton"):
        assert select("binarize", None, CPU).name == "triton"


@needs_triton
@pytest.mark.parametrize(
    ("changes", "shape", "dtype"),
    [
        ({"out_channels": 5}, (9, 32, 64), torch.int8),
        ({"out_channels": 65}, (9, 128, 64), torch.int8),
        ({"out_channels": 4}, (18, 4), torch.int32),
        ({"in_channels": 66, "out_channels": 6, "groups": 2}, (18, 6), torch.int32),
    ],
)
def test_weights_are_laid_out_for_the_kernel_that_reads_them(
    changes: dict[str, int], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    conv = Conv2dGeometry(**{"in_channels": 33, "kernel_size": (3, 3), **changes})  # type: ignore[arg-type]
    backend = TritonBackend()
    assert backend.prepack_layout(conv) == (shape, dtype)
    prepacked = backend.prepack(torch.zeros(conv.weight_shape, dtype=torch.int32), conv)
    assert prepacked.shape == shape
    assert prepacked.dtype == dtype
    assert prepacked.is_contiguous()
