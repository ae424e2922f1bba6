"""The steps of the GPU check, on a CPU: tests, networks, layers, counters, a sanitizer."""

import dataclasses
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu import device, layers, networks, tests
from gpu.layers import floor_s
from gpu.record import file_results, read
from gpu.select_tests import is_of
from gpu.target import ROOT, SKIPPED, STAND_IN, Skipped, Target, Wrong, run_step

from biper_engine.bench import ConvShape
from biper_engine.ops.backends import by_name
from tests.benchmarks.gpu_stand_in import on_cpu
from tests.shared import _label, _runs

HERE = on_cpu()


@pytest.fixture(autouse=True)
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("BIPER_GPU_WORK", str(tmp_path / "work"))
    monkeypatch.delenv("BIPER_BACKEND", raising=False)
    return tmp_path


def of_kind(out: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read(out) if line["kind"] == kind]


# -- tests ----------------------------------------------------------------------------------------


def item(marked: bool = False, **given: Any) -> Any:
    parameters = SimpleNamespace(params=given) if given else None
    return SimpleNamespace(callspec=parameters, get_closest_marker=lambda _: marked or None)


def test_tests_of_a_backend_are_those_whose_fixtures_run_it_on_the_gpu() -> None:
    for backend, wanted in (("cuda", {"cuda"}), ("triton", {"triton-cuda"})):
        given = {_label(*run): item(run=run) for run in _runs()}
        kept = {name for name, test in given.items() if is_of(test, backend, rehearsal=False)}
        assert kept == wanted  # neither reference-cuda nor triton-cpu nor cuda-emulated-90
    for marked in (item(cuda="gpu"), item(marked=True)):
        assert is_of(marked, "cuda", rehearsal=False)
        assert not is_of(marked, "triton", rehearsal=False)
    for other in (item(), item(cuda="emulated"), item(dtype="cuda")):
        assert not is_of(other, "cuda", rehearsal=False)
    assert is_of(item(run=("cuda", "cpu", "90")), "cuda", rehearsal=True)


def test_every_file_with_tests_of_a_gpu_runs_and_the_cpu_s_do_not() -> None:
    found = {path.name for path in tests.files(ROOT / "tests")}
    assert found > {"test_bconv2d.py", "test_stem.py", "test_cuda.py", "test_cuda_gpu.py"}
    assert not found & {"test_cpu.py", "test_reference.py"}


def test_a_file_that_crashes_keeps_the_tests_that_ran(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = "@pytest.fixture(params=[('cuda', 'cuda', None), ('cpu', 'cpu', 'avx2')])"
    bodies = {"right": "pass", "wrong": "assert 0", "missing": "pytest.skip('why')"}
    bodies["crash"] = "os.kill(os.getpid(), 9)"
    text = f"import os, pytest\n{fixture}\ndef run(request): return request.param\n"
    text += "".join(f"def test_{name}(run): {body}\n" for name, body in bodies.items())
    (out / "test_a.py").write_text(text, "utf-8")
    monkeypatch.setattr(tests, "ROOT", out)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    wanted = r"1 passed, 1 failed in 1 files; failed: .*; test_a.py: ended with -9"
    with pytest.raises(Wrong, match=wanted):
        tests.verdict([tests.Job(out / "test_a.py", "cuda")])
    (found,) = file_results(read(out))
    assert (found.passed, found.failed, found.skipped) == (1, ["test_wrong[run0]"], {"why": 1})
    assert found.problem.startswith("ended with -9; ")


def test_kernels_of_others_are_left_alone_where_the_tool_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    known = ("--kernel-name", "kernel_substring"), ("--kernel-regex", "kernel_substring")
    for option, key in (*known, ("--kernel-nam", "kernel_substring"), ("--kernel-name", "pattern")):
        text = (
            f"Usage:\n\n  --tool arg  A tool.\n  {option} arg  key1=val1\n    {key}, kns : a part"
        )
        tool.write_text(f"#!/bin/sh\ncat <<'E'\n{text}\nE\n", "utf-8")
        tool.chmod(0o755)
        filters = [option, "kernel_substring=biper"] if (option, key) in known else []
        assert tests.only_ours(str(tool)) == filters
    jobs = tests.watched()
    assert [job.prefix[-1] for job in jobs[:3]] == [f"--tool={tool}" for tool in tests.TOOLS]
    assert all(job.prefix[0] == str(tool) and job.path.is_file() for job in jobs)
    sources = [path.read_text("utf-8") for path in (ROOT / "csrc" / "cuda").glob("*.cu*")]
    before = [text.partition("__global__")[0] for text in sources if "__global__" in text]
    assert all(f"namespace {tests.NAMESPACE}" in text for text in before)


# -- build and ceilings ---------------------------------------------------------------------------


def test_the_build_is_for_the_gpu_at_hand_and_does_not_need_the_cpu_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("BIPER_CUDA_ARCHS", raising=False)
    command, variables = Target(device=HERE.device).install()
    assert {"--no-build-isolation", "--no-deps", "--no-index"} < set(command)
    wanted = {"BIPER_CUDA_ARCHS": "90", "BIPER_CUDA": "1", "BIPER_REQUIRE_NATIVE": "0"}
    assert variables == wanted


def test_a_missing_cpu_extension_is_reported_and_a_missing_cuda_one_fails(out: Path) -> None:
    def built(status: int, *extensions: str) -> str:
        command = [sys.executable, "-c", f"raise SystemExit({status})"]
        here = dataclasses.replace(HERE, install=lambda: (command, {}), extensions=extensions)
        return device.build(here)

    assert built(0, "no_cpu", "json").startswith("no_cpu: No module named 'no_cpu', json: ")
    with pytest.raises(Wrong, match=r"ended with 0; json: .*, no_cuda: No module named 'no_cuda'"):
        built(0, "json", "no_cuda")
    with pytest.raises(Wrong, match="the build ended with 1; json: "):
        built(1, "json")  # what is there may be of an older build
    assert [line["status"] for line in of_kind(out, "build")] == [0, 0, 1]


def test_a_peak_that_a_card_lacks_is_recorded_with_its_reason(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(kind: int, milliseconds: int) -> float:
        if kind == device.PEAKS["binary_macs"]:
            raise RuntimeError("no 1-bit matrix instructions")
        return 1e12 * (kind + milliseconds)

    native = SimpleNamespace(module=SimpleNamespace(measure_peak=peak))
    monkeypatch.setattr(device, "by_name", lambda _: SimpleNamespace(_native=native))
    assert device.ceilings(HERE).endswith("not measured: binary_macs")
    found = {line["name"]: line for line in of_kind(out, "ceiling")}
    assert set(found) == {*device.PEAKS, "copy_bytes", "l2_copy_bytes", "float_macs"}
    assert found["binary_macs"]["reason"] == "no 1-bit matrix instructions"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_step_is_skipped_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(STAND_IN, raising=False)
    assert run_step(lambda here: "done") == SKIPPED
    assert capsys.readouterr().out.startswith("no GPU: torch ")


# -- networks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted() -> networks.Prepared:
    return networks.prepare(networks.NETWORKS[0], HERE)


@pytest.fixture
def prepared(converted: networks.Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Skipped, match="resnet18_1w1a is missing"):
        networks.load(networks.NETWORKS[0])
    monkeypatch.setattr(networks, "NETWORKS", networks.NETWORKS[:1])
    monkeypatch.setattr(networks, "TURNS", 2)
    monkeypatch.setattr(networks, "prepare", lambda _name, _here: converted)
    assert networks.prepare_all(HERE) == "1 networks converted"


def measured(*words: str, here: Target = HERE) -> str:
    options = networks.arguments(["run", networks.NETWORKS[0], "--backend", "reference", *words])
    with torch.inference_mode():
        return networks.run(here, options)


def test_a_network_is_checked_then_timed_in_turn(out: Path, prepared: None) -> None:
    assert measured("--batch", "256", "--batch", "1").endswith("timed at batch 256, 1")
    checks, times = of_kind(out, "check"), of_kind(out, "time")
    assert [line["who"] for line in checks] == ["reference float16", "reference float32"]
    assert checks[1]["images"] == [2, 2]
    whos = ["reference float16", "reference float32", "eager float16"]
    assert [line["who"] for line in times] == whos * 2 * 2
    assert {(line["batch"], line["turn"]) for line in times} == {(256, 0), (256, 1), (1, 0), (1, 1)}
    assert len(of_kind(out, "call")) == len(times)
    texts = [one["execution"] for one in of_kind(out, "contender") if "execution" in one]
    assert all(text.startswith("operator by operator, since ") for text in texts)


def test_a_compiled_rival_is_timed_beside_ours_and_one_that_fails_is_recorded(
    out: Path, prepared: None
) -> None:
    measured("--batch", "2", "--rival", "--step", "compile")
    found = {line["who"] for line in of_kind(out, "time")}
    assert found == {"reference float16", "compile float16", "eager float16"}
    (rival,) = [line for line in of_kind(out, "contender") if "compile_s" in line]
    assert rival["difference"] == 0.0

    def broken(_network: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    with pytest.raises(Wrong, match=r"^compile: no compiler$"):
        measured("--batch", "2", "--rival", here=dataclasses.replace(HERE, compiled=broken))
    assert of_kind(out, "refused")[0]["reason"] == "no compiler"


def test_what_is_wrong_is_not_timed(
    out: Path, prepared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.3, 0.4]])
    assert networks.agreeing(wanted + torch.tensor([4e-4, 0.0]), wanted) == (2, 3)
    assert networks.agreeing(torch.full_like(wanted, torch.nan), wanted) == (0, 3)
    monkeypatch.setattr(networks, "agreeing", lambda got, _wanted: (0, len(got)))
    with pytest.raises(Wrong, match="WRONG: it agrees with the reference on only 0 of 2 images"):
        measured("--batch", "2")
    assert {line["who"] for line in of_kind(out, "time")} == {"reference float16", "eager float16"}


# -- layers ---------------------------------------------------------------------------------------


def test_a_layer_that_is_right_is_timed_and_a_wrong_one_is_named(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = ConvShape(in_channels=33, out_channels=20, size=5, stride=2)
    case = layers.Case(layer, 2, HERE.device)
    dots = by_name("reference").bconv2d(case.bits, case.packed, layer.geometry, None)
    assert torch.equal(case.float16()().float(), dots.float())
    with torch.inference_mode():
        assert layers.measure(layer, 2, HERE, "reference", "no such") == []
        assert [line["who"] for line in of_kind(out, "layer")] == ["reference", "float16"]
        assert "no such" in of_kind(out, "refused")[0]["reason"]
        monkeypatch.setattr(layers, "equal", lambda _got, _wanted: False)
        told = f"reference differs from the reference on {layer.name}, batch 2"
        assert layers.measure(layer, 2, HERE, "reference") == [told]


def test_maps_are_equal_by_their_bytes() -> None:
    zeros = torch.zeros(2, 3, dtype=torch.float16)
    assert layers.equal((zeros, None), (zeros.clone(), None))
    for other in ((-zeros, None), (zeros, zeros), (zeros.bfloat16(), None)):
        assert not layers.equal((zeros, None), other)


def test_counters_are_read_from_what_ncu_writes() -> None:
    text = '==PROF== x\n"ID","Kernel Name","a.sum"\n"","","us"\n"0","conv","1,234.5"\n'
    assert layers.counted(text) == [{"kernel": "conv", "counters": {"ID": 0.0, "a.sum": 1234.5}}]
    assert layers.counted("==ERROR== no counters") == []
    assert {"--clock-control", "none"} < set(layers.NCU)


def test_a_layer_moves_its_bits_and_its_residual_twice() -> None:
    pixels, weights = 56 * 56, 64 * 9 * 2 * 4
    for batch in (1, 256):
        work = layers.work_of(layers.RESNET[0], batch)
        assert work["bytes"] == batch * pixels * (8 + 8 + 2 * 64 * 2) + weights
        assert work["macs"] == batch * pixels * 64 * 576


def test_the_longer_of_two_times_is_the_floor() -> None:
    rates = {"copy_bytes": 1e12, "l2_copy_bytes": 4e12, "l2_bytes": 1000.0}
    rates |= {"binary_macs": 1e15, "int8_macs": 1e14}
    work = {"bytes": 2_000_000, "macs": 10**9}
    assert floor_s(work, rates) == (pytest.approx(2e-6), "bytes")
    assert floor_s({**work, "macs": 3 * 10**9}, rates) == (pytest.approx(3e-6), "macs")
    assert floor_s({**work, "bytes": 500, "macs": 0}, rates) == (pytest.approx(1.25e-10), "bytes")
    assert floor_s(work, {"int8_macs": 1e14}) == (pytest.approx(1e-5), "macs")
    assert floor_s(work, {}) is None
