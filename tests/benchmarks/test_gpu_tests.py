"""The steps of the GPU check that run tests, sanitizers and trained digits."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import gpu_digits
import gpu_sanitizer
import gpu_tests
import pytest
import torch
from gpu_tests import Counts, collectable, count, imports, marked, stand_in, verdict
from torch import Tensor

REPORT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_a" name="test_a[cuda-1x1]"/>
<testcase classname="tests.ops.test_a" name="test_a[triton-1x1]">
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
    assert found.ran == {"cuda": 2}


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


def test_what_sanitizers_watch_is_right_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIPER_BACKEND", raising=False)
    with torch.inference_mode():
        assert gpu_sanitizer.convolutions("reference", torch.device("cpu")) == []


@pytest.mark.deep
def test_the_network_that_sanitizers_watch_has_one_answer() -> None:
    with torch.inference_mode():
        assert gpu_sanitizer.network("reference", torch.device("cpu")) == []


def test_what_sanitizers_watch_has_ragged_edges_groups_and_pools() -> None:
    cases = gpu_sanitizer.small_set()
    assert any(geometry.groups > 1 for geometry, _, _ in cases)
    assert any(geometry.in_channels % 32 for geometry, _, _ in cases)
    assert any(not pool.is_identity for _, _, pool in cases)


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
