"""The steps of the GPU check that run tests, sanitizers and trained digits."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_digits
import gpu_sanitizer
import gpu_tests
import pytest
import torch
from gpu import ROOT
from gpu_tests import Counts, backends_of, collectable, count, imports, marked, stand_in, verdict
from torch import Tensor

import biper_engine
from biper_engine.ops.backends import Backend, by_name
from tests.conftest import _runs

CPU = torch.device("cpu")
REPORT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_a" name="test_a[cuda-1x1]"/>
<testcase classname="tests.ops.test_a" name="test_a[triton-cuda-1x1]">
<skipped message="triton: no"/></testcase>
<testcase classname="tests.ops.test_a" name="test_b[reference-cuda-x]">
<failure message="x"/></testcase>
<testcase classname="tests.ops.test_a" name="test_cudagraphs"><error message="y"/></testcase>
</testsuite></testsuites>"""


def test_a_report_of_pytest_is_counted_by_backend() -> None:
    found = count(REPORT)
    assert found.passed == 1
    assert found.failed == [
        "tests.ops.test_a::test_b[reference-cuda-x]",
        "tests.ops.test_a::test_cudagraphs",
    ]
    assert found.skipped == {"triton: no": 1}
    assert found.ran == {"cuda": 1}


@pytest.mark.parametrize(
    ("name", "backends"),
    [
        ("test_a[cuda]", {"cuda"}),
        ("test_a[cuda-1x1 strided]", {"cuda"}),
        ("test_a[float32-cuda-65]", {"cuda"}),
        ("test_a[triton-cuda-33]", {"triton"}),
        ("test_a[float32-triton-cuda]", {"triton"}),
        ("test_a[reference-cuda-33]", set()),
        ("test_a[cuda-emulated-90-33]", set()),
        ("test_a[triton-cpu-33]", set()),
        ("test_a[cpu-avx2]", set()),
        ("test_cuda", set()),
    ],
)
def test_the_device_of_another_backend_does_not_count_as_the_backend_cuda(
    name: str, backends: set[str]
) -> None:
    assert backends_of(name) == backends


def test_every_backend_of_the_matrix_counts_as_itself_on_a_gpu_alone() -> None:
    counted = {str(entry.id): backends_of(f"test_a[{entry.id}-x]") for entry in _runs()}
    assert {name for name, found in counted.items() if found} == {"cuda", "triton-cuda"}


def test_a_backend_on_which_nothing_ran_fails_the_step() -> None:
    matrix = Counts(passed=5, ran=Counter(cuda=5), skipped=Counter({"triton: no kernels": 5}))
    status, line = verdict(Counts(), matrix, [])
    assert status == 1
    assert "nothing ran on triton: triton: no kernels" in line
    matrix.ran["triton"] = 1
    assert verdict(Counts(passed=2), matrix, []) == (
        0,
        "7 passed, 0 failed; 5 of the matrix on cuda; 1 of the matrix on triton",
    )
    assert verdict(Counts(failed=["a::b"]), matrix, [])[0] == 1
    assert verdict(Counts(), matrix, ["gpu: stopped after 9 s"])[0] == 1


def test_files_that_need_what_is_missing_are_left_out_by_name(tmp_path: Path) -> None:
    needs = tmp_path / "test_needs.py"
    needs.write_text("from typer.testing import CliRunner\nimport hypothesis.strategies\n", "utf-8")
    plain = tmp_path / "test_plain.py"
    plain.write_text("import torch\n# typer\n", "utf-8")
    assert imports(needs) == {"typer", "hypothesis"}
    usable, reasons = collectable([needs, plain], ["typer", "hypothesis"])
    assert usable == [plain]
    assert reasons == {"test_needs.py": "it needs typer"}
    assert collectable([needs], ["hypothesis"]) == ([needs], {})


def test_marked_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("@pytest.mark.gpu\n", "utf-8")
    (tmp_path / "test_b.py").write_text("gpu\n", "utf-8")
    assert marked(tmp_path) == [tmp_path / "test_a.py"]


def test_without_hypothesis_its_tests_skip_and_others_run(tmp_path: Path) -> None:
    place = stand_in(tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "from hypothesis import HealthCheck, assume, example, given, settings\n"
        "from hypothesis import strategies as st\n"
        "@st.composite\n"
        "def pairs(draw):\n    return draw(st.integers())\n"
        "settings.register_profile('a', deadline=None)\n"
        "settings.load_profile('a')\n"
        "@settings(max_examples=3)\n"
        "@pytest.mark.parametrize('z', [1, 2])\n"
        "@given(x=st.integers(0, 3).map(str), y=pairs())\n"
        "@example(x='1', y=2)\n"
        "def test_property(x, y, z, tmp_path):\n    assert False\n"
        "def test_plain():\n    assert True\n",
        "utf-8",
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-p", "no:hypothesispytest", f"--junitxml={report}", str(tmp_path / "test_it.py")]
    environment = {"PYTHONPATH": place, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = count(report.read_text("utf-8"))
    assert found.passed == 1
    assert found.skipped == {"hypothesis is not installed": 2}


class Finished:
    """A process that has ended well; it remembers what each may take."""

    waited: list[tuple[list[str], float]]

    def __init__(self, command: list[str], log: Path, environment: Any) -> None:
        self._command = command
        log.write_text("done\n", "utf-8")
        for word in command:
            if word.startswith("--junitxml="):
                Path(word.partition("=")[2]).write_text(REPORT, "utf-8")

    def wait(self, seconds: float) -> int:
        self.waited.append((self._command, seconds))
        return 0

    def stop(self) -> None:
        pass


def test_the_matrix_leaves_time_to_the_tests_that_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_RUN", str(tmp_path))
    monkeypatch.setenv("STEP_LIMIT_S", "103")
    monkeypatch.setattr(Finished, "waited", [], raising=False)
    monkeypatch.setattr(gpu_tests, "Group", Finished)
    monkeypatch.setattr(gpu_tests, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu_tests, "missing", lambda *_names: [])
    monkeypatch.setattr(gpu_tests, "marked", lambda _folder: [Path(__file__)])
    gpu_tests.main()
    (matrix, given), (marked_words, left) = Finished.waited
    assert "cuda or triton" in matrix
    assert 60 < given <= 65
    assert "gpu" in marked_words
    assert 90 < left <= 100
    monkeypatch.setattr(gpu_tests, "marked", lambda _folder: [])
    gpu_tests.main()
    assert 90 < Finished.waited[2][1] <= 100


# -- sanitizers -----------------------------------------------------------------------------------


def test_what_sanitizers_watch_is_right_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIPER_BACKEND", raising=False)
    with torch.inference_mode():
        assert gpu_sanitizer.convolutions("reference", CPU) == []


def test_the_reference_of_what_sanitizers_watch_is_computed_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, devices = by_name("reference"), set()
    own = reference.bind_fused

    def bound(*operands: Any) -> Any:
        run = own(*operands)

        def remembered(bits: Tensor, residual: Tensor | None) -> Any:
            devices.add(bits.device.type)
            return run(bits, residual)

        return remembered

    monkeypatch.setattr(reference, "bind_fused", bound)
    layer = gpu_sanitizer.small_set()[0]
    case, wanted = gpu_sanitizer.on_both(layer, torch.device("meta"))
    assert devices == {"cpu"}
    assert {x.device.type for x in wanted} == {"cpu"}
    operands = [case.bits, case.packed, case.residual, *case.epilogue.tensors().values()]
    assert {x.device.type for x in operands if x is not None} == {"meta"}


class Tiled:
    """A convolution that takes the tile that it is asked for, or one of 32 rows."""

    made: list[int]
    stubborn = False

    def __init__(self, *_operands: Any, processors: int) -> None:
        self.made.append(processors)
        self._rows = 32 if self.stubborn else {1: 128, 2: 64, 4: 32}[processors]

    def way(self, *_operands: Any) -> Any:
        return SimpleNamespace(rows=self._rows)

    def fused(self, *_operands: Any) -> tuple[Any, ...]:
        return ("some", "bits")


class Tiling:
    """As much of the CUDA backend as there is to make convolutions that take a tile."""

    def __init__(self, *, has_tensor_cores: bool = True) -> None:
        properties = SimpleNamespace(has_binary_mma=has_tensor_cores, has_byte_mma=False)
        module = SimpleNamespace(device_properties=lambda: properties)
        self._native = SimpleNamespace(module=module, on=torch.device)

    def prepack(self, *_operands: Any) -> None:
        pass


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> type[Tiled]:
    from biper_engine.ops import cuda

    monkeypatch.setattr(Tiled, "made", [], raising=False)
    monkeypatch.setattr(cuda, "_Conv", Tiled)
    monkeypatch.setattr(gpu_sanitizer, "differs", lambda _got, _wanted: False)
    return Tiled


def test_every_tile_is_watched_and_another_one_is_named(
    tiled: type[Tiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: Any = Tiling()
    with torch.inference_mode():
        assert gpu_sanitizer.tiles(backend, CPU) == []
    assert tiled.made == [1, 2, 4] * 3
    monkeypatch.setattr(tiled, "stubborn", True)
    with torch.inference_mode():
        wrong = gpu_sanitizer.tiles(backend, CPU)
    assert sum("takes a tile of 32 rows instead of 128" in text for text in wrong) == 3
    assert sum("takes a tile of 32 rows instead of 64" in text for text in wrong) == 3
    monkeypatch.setattr(gpu_sanitizer, "differs", lambda _got, _wanted: True)
    with torch.inference_mode():
        assert len(gpu_sanitizer.tiles(backend, CPU)) == 6 + 9


def test_a_device_without_tensor_cores_has_no_tiles(tiled: type[Tiled]) -> None:
    backend: Any = Tiling(has_tensor_cores=False)
    assert gpu_sanitizer.tiles(backend, CPU) == []
    assert tiled.made == []


@pytest.mark.deep
@pytest.mark.parametrize("capability", ["90", "120"])
def test_tiles_that_sanitizers_watch_are_those_of_csrc(
    emulated_cuda: Backend, monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    monkeypatch.setenv("BIPER_EMULATED_CAPABILITY", capability)
    backend: Any = emulated_cuda
    with torch.inference_mode():
        assert gpu_sanitizer.tiles(backend, CPU) == []


@pytest.mark.deep
def test_the_network_that_sanitizers_watch_has_one_answer() -> None:
    with torch.inference_mode():
        assert gpu_sanitizer.network("reference", CPU) == []


@pytest.mark.parametrize(("uncached", "calls"), [("1", 1), ("", 3)])
def test_where_no_memory_can_be_allocated_in_a_capture_there_is_none(
    monkeypatch: pytest.MonkeyPatch, uncached: str, calls: int
) -> None:
    made = []

    def engine(images: Tensor) -> Tensor:
        made.append(len(images))
        return images

    converted = SimpleNamespace(to=lambda _device: engine)
    monkeypatch.setattr(biper_engine, "convert", lambda *_network, **_options: converted)
    monkeypatch.setattr("gpu_prepare.binary_network", lambda _name: None)
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", uncached)
    assert gpu_sanitizer.network("reference", CPU) == []
    assert len(made) == calls


def test_what_sanitizers_watch_has_ragged_edges_groups_and_pools() -> None:
    layers = gpu_sanitizer.small_set()
    assert any(layer.geometry.groups > 1 for layer in layers)
    assert any(layer.geometry.in_channels % 32 for layer in layers)
    assert any(not layer.pool.is_identity for layer in layers)


HELP = """Usage: compute-sanitizer [options] [your-program]

  --error-exitcode arg      An exit status.
  {option} arg         key1=val1,key2=val2,...
                            Valid values for keys are:
                                {key}, kns : a substring in the mangled name
  {option}-exclude arg key1=val1,key2=val2,...
                                {key}, kns : a substring in the mangled name
"""


def tool(folder: Path, text: str) -> str:
    """Write a program that prints a help, or what it is called with, and return its path."""
    path = folder / "compute-sanitizer"
    (folder / "help").write_text(text, "utf-8")
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = --help ]; then cat {folder}/help; else echo "$@"; fi\n', "utf-8"
    )
    path.chmod(0o755)
    return str(path)


def test_kernels_of_others_are_left_alone_where_the_tool_says_how(tmp_path: Path) -> None:
    for option in ("--kernel-name", "--kernel-regex"):
        program = tool(tmp_path, HELP.format(option=option, key="kernel_substring"))
        assert gpu_sanitizer.only_ours(program) == [option, "kernel_substring=biper"]
    for option, key in (("--kernel-nam", "kernel_substring"), ("--kernel-name", "pattern")):
        program = tool(tmp_path, HELP.format(option=option, key=key))
        assert gpu_sanitizer.only_ours(program) == []
    assert gpu_sanitizer.only_ours(tool(tmp_path, "")) == []


def test_a_tool_gets_the_filter_and_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_RUN", str(tmp_path))
    program = tool(tmp_path, HELP.format(option="--kernel-name", key="kernel_substring"))
    options = gpu_sanitizer.only_ours(program)
    assert gpu_sanitizer.watch("racecheck", program, options, 20.0) == ""
    words = (tmp_path / "sanitizer-racecheck.log").read_text("utf-8").split()
    assert words[0] == "--tool=racecheck"
    at = words.index("--kernel-name")
    assert words[at + 1] == "kernel_substring=biper"
    assert at + 1 < words.index(sys.executable) < words.index("--work")


def test_all_kernels_are_in_the_namespace_that_the_filter_names() -> None:
    sources = [*(ROOT / "csrc" / "cuda").glob("*.cu*")]
    texts = {path.name: path.read_text("utf-8") for path in sources}
    kernels = {name: text for name, text in texts.items() if "__global__" in text}
    assert kernels
    for name, text in kernels.items():
        before = text.partition("__global__")[0]
        assert f"namespace {gpu_sanitizer.NAMESPACE}" in before, name


# -- digits ---------------------------------------------------------------------------------------


class Fixed:
    def __init__(self, classes: Tensor) -> None:
        self._logits = torch.nn.functional.one_hot(classes, 10).float()

    def __call__(self, images: Tensor) -> Tensor:
        return self._logits[: len(images)]


def test_agreement_is_with_the_exact_mode_whatever_is_right() -> None:
    classes = torch.tensor([0, 1, 2, 3])
    engines = {
        "float32": Fixed(torch.tensor([0, 1, 2, 9])),
        "float16": Fixed(torch.tensor([0, 1, 9, 9])),
    }
    found = gpu_digits.agreement(engines, torch.zeros(4, 3, 2, 2), classes)  # type: ignore[arg-type]
    assert found["float16"] == {"accuracy": 0.5, "same_class": 3, "images": 4}
    assert found["float32"] == {"accuracy": 0.75, "same_class": 4, "images": 4}
    alone = gpu_digits.agreement({"float16": engines["float16"]}, torch.zeros(4, 1), classes)  # type: ignore[dict-item]
    assert alone["float16"]["same_class"] is None


def test_the_names_of_tests_tell_backends_as_the_matrix_has_them() -> None:
    assert gpu_tests.BACKENDS == ("cuda", "triton")
