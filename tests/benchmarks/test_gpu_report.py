"""Tables and pictures of the GPU check, from results that were made up."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import gpu_plot
import gpu_report
import pytest
from gpu_report import gathered, layer_rows, main, network_lines, network_rows, tables
from PIL import Image

CEILINGS = {
    "l2_bytes": 1000, "copy_bytes": 1e12, "l2_copy_bytes": 4e12, "binary_macs": 1e15,
    "popcount_macs": 1e13, "int8_macs": 1e14, "float_macs": 2e14, "launches": 5e5,
    "not_measured": {"float_mma_macs": "no such thing"},
}  # fmt: skip
NETWORK = "imagenet/resnet18_1w1a"


def layer(name: str, batch: int, nbytes: float, **ms: float) -> dict[str, Any]:
    work = {"nbytes": nbytes, "bit_macs": 1e6, "grouped_bit_macs": 0, "float_macs": 0}
    return {
        "network": "net", "layer": name, "variant": "bits", "batch": batch, "work": work,
        "ms": ms, "quartiles_ms": {}, "did_not_run": {}, "wrong": [],
    }  # fmt: skip


def taken(**ms: float) -> dict[str, Any]:
    return {
        name.replace("_", " "): {"throughput_ms": value, "latency_ms": value + 0.01}
        for name, value in ms.items()
    }


def contest(batch: int, group: str, **ms: float) -> dict[str, Any]:
    return {
        "kind": "contest", "network": NETWORK, "batch": batch, "group": group,
        "taken": taken(**ms), "image_dtypes": {}, "did_not_run": {},
    }  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    kernel = {"name": "a", "map_bytes": 1_000_000, "weight_bytes": 2_000_000, "bit_macs": 10**6,
              "grouped_bit_macs": 0, "float_macs": 0}  # fmt: skip
    checks = {
        "kind": "checks", "network": NETWORK, "nodes": {"cuda float16": [19, ["n (1 of 2)"]]},
        "images": {"cuda": [31, 32]}, "top1": {"cuda float16": [250, 256]},
        "reasons": {"cuda float16": "WRONG: 1 of 19 operators, n (1 of 2)"},
    }  # fmt: skip
    return {
        "schema": 1,
        "machine": {"gpu": "a made-up GPU"},
        "ceilings": CEILINGS,
        "layers": {
            "contests": [
                layer("64@56", 256, 1e6, cuda=0.002, triton=0.004, float16=0.008, int8=0.006),
                layer("64@56", 1, 500, cuda=0.001, float16=0.002),
            ],
            "skipped": {"64@7": "needs 2 s, 1 s were left"},
        },
        "networks": {
            "skipped": {"x": "needs 25 s, 3 s were left"},
            "failed": {"y": "stopped after 9 s"},
            "checks": [checks],
            "refused": [],
            "kernels": {NETWORK: [kernel, kernel]},
            "contests": [
                contest(256, "cuda", cuda_float16=1.0, cuda_float32=2.0, eager_float16=8.0),
                contest(8, "cuda", cuda_float16=0.1, eager_float16=1.0),
                # In these cuda float16 is there to be compared with; its own figure is above.
                contest(256, "compile float16", cuda_float16=2.0, compile_float16=6.0,
                        eager_float16=9.0),
                contest(256, "triton", cuda_float16=2.0, triton_float16=3.0, eager_float16=9.0),
            ],
        },
    }  # fmt: skip


def test_a_layer_is_beside_the_slower_of_its_two_limits(results: dict[str, Any]) -> None:
    large, small = layer_rows(results)
    assert large["floor_ms"] == pytest.approx(1e-3)
    assert large["bound"] == "bytes"
    assert large["share"] == pytest.approx({"cuda": 0.5, "triton": 0.25})
    assert small["bound"] == "bits"
    assert small["floor_ms"] == pytest.approx(1e-6)


def test_a_ratio_is_of_the_contest_in_which_both_were_called_in_turn(
    results: dict[str, Any],
) -> None:
    small, row = network_rows(results)
    assert (small["batch"], row["batch"]) == (8, 256)
    assert row["throughput_ms"] == {
        "cuda float16": 1.0, "cuda float32": 2.0, "eager float16": 8.0,
        "compile float16": 6.0, "triton float16": 3.0,
    }  # fmt: skip
    assert row["faster"]["compile float16"] == 3.0
    assert row["faster"]["triton float16"] == 1.5
    assert row["faster"]["eager float16"] == 8.0


def test_a_network_is_beside_the_sum_of_its_kernels_limits(results: dict[str, Any]) -> None:
    row = network_rows(results)[1]
    assert row["floor_ms"] == pytest.approx(1e3 * 2 * (2e6 + 256e6) / 1e12)
    assert row["share"] == pytest.approx(row["floor_ms"] / 1.0)
    results["networks"]["kernels"] = {}
    assert network_rows(results)[1]["share"] is None
    results["ceilings"] = {}
    assert layer_rows(results)[0]["share"] == {"cuda": None, "triton": None}


def test_tables_tell_all_that_was_found_and_all_that_was_not(results: dict[str, Any]) -> None:
    lines = {" ".join(line.split()) for line in tables(results).splitlines()}
    assert "net 64@56 bits 256 2.0 4.0 8.0 6.0 1.0 bytes 50% 25% 4.0" in lines
    assert "net 64@56 bits 1 1.0 - 2.0 - 0.0 bits 0% - 2.0" in lines
    rates = "128,000 256,000 85,333 32,000 42,667 496,124 52% 3.00"
    assert f"{NETWORK} 256 {rates}" in lines
    assert f"{NETWORK} 8 - 80,000 - 8,000 - 400,000 20% -" in lines
    assert f"{NETWORK}, cuda float16: 18 of 19 operators equal the reference" in lines
    assert "layers, skipped: 64@7: needs 2 s, 1 s were left" in lines
    assert "networks, failed: y: stopped after 9 s" in lines
    assert "launch gap in a CUDA graph: 2.00 us" in lines
    assert "float_mma_macs: not measured, no such thing" in lines


def test_without_results_there_is_nothing_to_tell() -> None:
    assert tables({"schema": 1}) == ""


def test_a_report_is_drawn_anew_from_its_file(
    results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results), "utf-8")
    assert main([str(path)]) == 0
    pictures = [gpu_report.RATE, gpu_report.LATENCY, gpu_report.ROOF]
    assert {one.name for one in tmp_path.iterdir()} == {
        "results.json", "report.txt", *pictures
    }  # fmt: skip
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 1000
    assert ", ".join(pictures) in capsys.readouterr().out


def test_what_steps_left_is_gathered_and_a_line_that_was_cut_off_is_left_out(
    results: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("machine", "ceilings", "layers"):
        (tmp_path / f"{name}.json").write_text(json.dumps(results[name]), "utf-8")
    networks = results["networks"]
    told = {"skipped": networks["skipped"], "failed": networks["failed"]}
    (tmp_path / "networks.json").write_text(json.dumps(told), "utf-8")
    entries = [*networks["checks"], *networks["contests"]]
    text = "\n".join(json.dumps(entry) for entry in entries)
    (tmp_path / gpu_report.LINES).write_text(f'{text}\n{{"kind": "conte', "utf-8")
    work = {"network": NETWORK, "kernels": networks["kernels"][NETWORK]}
    (tmp_path / "a.kernels.json").write_text(json.dumps(work), "utf-8")
    assert gathered(tmp_path) == results
    assert len(network_lines(tmp_path / gpu_report.LINES)) == len(entries)


def test_what_a_stopped_step_found_is_kept(results: dict[str, Any], tmp_path: Path) -> None:
    entry = results["networks"]["contests"][0]
    (tmp_path / gpu_report.LINES).write_text(json.dumps(entry) + "\n", "utf-8")
    assert gathered(tmp_path)["networks"]["contests"] == [entry]


def test_every_contestant_has_a_place_and_every_series_a_look(results: dict[str, Any]) -> None:
    for row in network_rows(results):
        assert set(row["throughput_ms"]) <= set(gpu_report.CONTESTANTS)
        assert set(row["throughput_ms"]) <= set(gpu_plot._STYLES)


@pytest.mark.parametrize("draw", [gpu_plot.rates, gpu_plot.latencies])
def test_a_panel_shows_each_network_over_its_batches(draw: Any, results: dict[str, Any]) -> None:
    figure = draw(network_rows(results), "a made-up GPU")
    axes = figure.axes[0]
    assert axes.get_title(loc="left").strip() == NETWORK
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "256"]
    lines = len(axes.get_lines())
    assert lines == (6 if draw is gpu_plot.rates else 5)


def test_bars_are_shares_of_the_roofline_and_no_words_overlap(results: dict[str, Any]) -> None:
    figure = gpu_plot.roofline(layer_rows(results), "a made-up GPU")
    figure.canvas.draw()
    widths = [bar.get_width() for axes in figure.axes for bar in axes.patches]
    assert sorted(widths) == pytest.approx([0.1, 25.0, 50.0])
    words = [text for axes in figure.axes for text in axes.texts if text.get_text()]
    boxes = [text.get_window_extent() for text in words]
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
