"""Tables and plots of the GPU check, from made-up lines, and a whole rehearsal."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from gpu import plot, report
from gpu.record import RESULTS, read
from gpu.runner import NAMES, ROOT
from PIL import Image

from tests.native import builds

NETWORK = "imagenet/resnet18_1w1a"
GPU = "a made-up GPU"


def timed(step: str, batch: int, **ms: float) -> list[dict[str, Any]]:
    where = {"network": NETWORK, "batch": batch, "step": step}
    return [
        {"kind": kind, **where, "who": who.replace("_", " "), "turn": 0, "ms": [value] * 3}
        for who, value in ms.items()
        for kind in ("time", "call")
    ]


def layer(batch: int, who: str, ms: float) -> dict[str, Any]:
    work = {"bytes": 1_000_000, "macs": 10**6}
    where = {"layer": "64@56", "batch": batch, "who": who}
    return {"kind": "layer", **where, "work": work, "ms": [9.0, ms, ms]}


def of_tests(file: str, **more: Any) -> dict[str, Any]:
    counts = {"done": True, "passed": 0, "failed": [], "skipped": {}}
    return {"kind": "tests", "file": file, "backend": "cuda", "under": ""} | counts | more


@pytest.fixture
def lines() -> list[dict[str, Any]]:
    check = {"kind": "check", "network": NETWORK, "operators": 19, "wrong": []}
    return [
        {"kind": "run", "minutes": 4, "rehearsal": False},
        {"kind": "machine", "gpu": GPU, "torch": "2.11.0", "commit": "0123abc", "l2_bytes": 1000},
        {"kind": "step", "name": "machine", "verdict": "ok", "seconds": 1.0, "told": GPU},
        of_tests("a.py", done=False, passed=3),
        of_tests("a.py", passed=40, failed=["test_x[1]"], skipped={"why": 2}),
        of_tests("b.py", done=False, passed=5),
        {**check, "who": "cuda float32", "images": [31, 32]},
        {**check, "who": "cuda float16", "wrong": ["n (1 of 2)"]},
        *timed("resnet18", 256, cuda_float16=1.0, cuda_float32=2.0, eager_float16=8.0),
        *timed("resnet18", 1, cuda_float16=0.1, eager_float16=1.0),
        {"kind": "counters", "layer": "64@56", "kernel": "k",
         "counters": {"gpu__time_duration.sum": 61.5}},
        # Here cuda float16 is there to be compared with; its own figure is above.
        *timed("compile", 256, cuda_float16=2.0, compile_float16=6.0, eager_float16=9.0),
        {"kind": "refused", "network": NETWORK, "who": "compile", "reason": "no compiler"},
        {"kind": "contender", "network": NETWORK, "who": "cuda float32", "batch": 1,
         "execution": "operator by operator, since capturing a CUDA graph failed: no"},
        {"kind": "ceiling", "name": "copy_bytes", "rate": 1e12},
        {"kind": "ceiling", "name": "binary_macs", "rate": 1e15},
        {"kind": "ceiling", "name": "int8_macs", "reason": "no such unit"},
        layer(256, "cuda", 0.002), layer(256, "triton", 0.004), layer(256, "float16", 0.008),
        layer(1, "cuda", 0.001),
    ]  # fmt: skip


def test_a_ratio_is_of_the_contest_in_which_both_were_called_in_turn(lines: Any) -> None:
    first, small, rival = report.contests(lines)
    assert (first["step"], small["batch"], rival["step"]) == ("resnet18", 1, "compile")
    assert first["time"] == {"cuda float16": 1.0, "cuda float32": 2.0, "eager float16": 8.0}
    found = {" ".join(line.split()) for line in report.tables(lines).splitlines()}
    assert f"{NETWORK} 256 resnet18 256,000 128,000 32,000 - -" in found
    assert f"{NETWORK} 256 compile 128,000 - 28,444 42,667 3.00" in found
    assert f"{NETWORK} 1 resnet18 100 - 1,000 -" in found  # microseconds


def test_a_layer_is_beside_the_longer_of_its_two_times(lines: Any) -> None:
    large, small = report.layers(lines)
    assert large["floor_ms"] == pytest.approx(1e-3)
    assert large["bound"] == "bytes"
    assert large["share"] == pytest.approx({"cuda": 0.5, "triton": 0.25})
    assert small["share"] == pytest.approx({"cuda": 1.0})
    assert report.layers([line for line in lines if line["kind"] != "ceiling"])[0]["share"] == {}


def test_tables_tell_all_that_was_found_and_all_that_was_not(lines: Any) -> None:
    text = report.tables(lines)
    found = {" ".join(line.split()) for line in text.splitlines()}
    assert found >= {
        f"{GPU}, torch 2.11.0, commit 0123abc",
        "64@56 256 2.0 4.0 8.0 1.0 bytes 50% 25% 4.0",
        "a.py cuda 40 1 2",
        "FAILED a.py cuda test_x[1]",
        "skipped: a.py cuda: 2 x why",
        "b.py cuda: stopped before its end",
        f"{NETWORK} cuda float32: 19 operators beside the reference, 31 of 32 images agree",
        f"{NETWORK} cuda float16: 19 operators beside the reference; WRONG: n (1 of 2)",
        f"{NETWORK} compile was not timed: no compiler",
        "int8 mma.sync: no such unit",
        "64@56 61.5 - - - - - -",
    }
    assert "cuda float32 runs operator by operator, since capturing" in text
    lines[0]["rehearsal"] = True
    assert "A REHEARSAL" in report.tables(lines)


def test_any_beginning_of_a_check_has_a_report(lines: Any) -> None:
    texts = [report.tables(lines[:count]) for count in range(len(lines) + 1)]
    assert texts[0] == "Nothing was recorded."
    assert [len(a) for a in texts[3:]] == sorted(len(a) for a in texts[3:])


def test_a_report_is_written_with_its_pictures(lines: Any, tmp_path: Path) -> None:
    assert report.write(tmp_path) == "Nothing was recorded."
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / RESULTS).write_text(f'{text}\n{{"kind": "tim', "utf-8")
    assert report.write(tmp_path) == report.tables(lines)
    pictures = [report.RATES, report.ROOFLINE]
    assert {one.name for one in tmp_path.iterdir()} == {RESULTS, report.TEXT, *pictures}
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 1000


def test_pictures_show_the_first_figures_and_shares_and_no_words_overlap(lines: Any) -> None:
    (axes,) = plot.rates(report.contests(lines), GPU).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "256"]
    found = sorted([round(rate) for rate in line.get_ydata()] for line in axes.get_lines())
    assert found == [[1000, 32000], [10000, 256000], [42667], [128000]]
    assert set(report.CONTESTANTS) == set(plot._STYLES)
    figure = plot.roofline(report.layers(lines), GPU)
    figure.canvas.draw()
    widths = [bar.get_width() for axes in figure.axes for bar in axes.patches]
    assert sorted(widths) == pytest.approx([25.0, 50.0, 100.0])
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts[1:]]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(("prepare", "resnet18"), marks=pytest.mark.deep, id="two"),
        pytest.param(
            ("machine", "prepare", "build", "resnet18", "counters", "ceilings", "layers"),
            marks=pytest.mark.weekly,
            id="all",
        ),
    ],
)
def test_a_rehearsal_killed_after_each_step_goes_on_and_has_all_in_its_report(
    steps: tuple[str, ...], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    module = os.environ.get("BIPER_EMULATED_MODULE")
    module = module or builds.shared(tmp_path_factory, "emulated_cuda", builds.emulated_library)
    out = tmp_path / "out"
    folders = {"OUT": str(out), "BIPER_GPU_WORK": str(tmp_path)}
    variables = {**os.environ, **folders, "PYTHON": sys.executable}
    variables["BIPER_EMULATED_MODULE"] = str(module)
    script = ROOT / "benchmarks" / "gpu_check.sh"
    command = ["bash", str(script), "--minutes", "4", "--rehearse", "--steps"]
    for name in steps:
        process = subprocess.Popen([*command, name, NAMES[-1]], env=variables, cwd=tmp_path)
        while process.poll() is None and not any(line["kind"] == "step" for line in read(out)):
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (step,) = [line for line in read(out) if line["kind"] == "step"]
        assert (step["name"], step["verdict"]) == (name, "ok"), step
        assert f"\n{name} " in report.write(out)
        (out / RESULTS).unlink()
