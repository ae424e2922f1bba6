"""A network node by node with a clock around each; structure and sums, never durations."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine.ops import cpu_processor
from biper_engine.ops.backends import backends, use_backend
from biper_engine.runtime import NodeProfile, ProfileReport
from tests.networks_by_hand import classifier


def test_every_operator_has_a_row_in_order(images: Tensor) -> None:
    with use_backend("reference"):
        report = classifier().profile(images, rounds=2)
    assert (report.batch, report.rounds, report.threads) == (3, 2, torch.get_num_threads())
    assert [(node.name, node.op, node.backend) for node in report.nodes][:4] == [
        ("stem", "aten.conv2d", "torch"),
        ("stem_bits", "binarize", "reference"),
        ("layer1_0", "bconv2d_float_bits", "reference"),
        ("layer1_1", "bconv2d_bits", "reference"),
    ]
    assert all(node.ms > 0 for node in report.nodes)
    assert report.total_ms == sum(node.ms for node in report.nodes)
    assert 0 < report.call_ms < 1e4
    assert abs(report.outside_ms) < 1e4
    assert json.loads(json.dumps(report.to_dict()))["nodes"][0]["name"] == "stem"


def test_multiply_accumulates_are_those_of_the_batch(images: Tensor) -> None:
    macs = {node.name: node.macs for node in classifier().profile(images, rounds=1).nodes}
    assert macs["layer1_0"] == 3 * 8 * 8 * 33 * 33 * 9
    assert macs["layer2_0"] == 3 * 4 * 4 * 33 * 40 * 9
    assert macs["stem"] is macs["pool"] is None


NODES = (
    NodeProfile(name="stem", op="aten.conv2d", backend="torch", ms=1.0),
    NodeProfile(name="conv", op="bconv2d_bits", backend="cpu", ms=2.0, macs=10**9),
    NodeProfile(name="other", op="bconv2d_bits", backend="reference", ms=1.0, macs=10**9),
)

REPORT: dict[str, Any] = {
    "batch": 4,
    "rounds": 3,
    "threads": 1,
    "nodes": NODES,
    "call_ms": 4.5,
    "outside_ms": 0.25,
}


def test_the_table_gives_shares_of_the_time_and_of_the_peak() -> None:
    report = ProfileReport(
        **{**REPORT, "peak_macs_per_second": 1e12, "isa": "avx2"},
    )
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines[1:4]] == [
        ["stem", "torch", "1000.0", "25.0%"],
        ["conv", "cpu", "2000.0", "50.0%", "500", "50%"],
        ["other", "reference", "1000.0", "25.0%", "1,000"],
    ]
    assert lines[4].split()[:2] == ["total", "4000.0"]
    assert lines[5].split(maxsplit=4)[3:] == ["4500.0", "250.0 outside of the above"]
    assert lines[6].startswith("peak: 1,000 GMAC/s")
    assert lines[6].endswith("(avx2, 1 thread)")
    values = report.to_dict()
    assert [node["share_of_peak"] for node in values["nodes"]] == [None, 0.5, None]
    assert values["nodes"][1]["share"] == 0.5
    assert (values["total_ms"], values["call_ms"], values["outside_ms"]) == (4.0, 4.5, 0.25)


def test_without_a_peak_there_is_no_share_of_it() -> None:
    report = ProfileReport(**REPORT)
    assert "peak" not in str(report)
    assert report.share_of_peak(NODES[1]) is None


def test_the_peak_is_of_all_threads_that_the_cpu_backend_uses(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not {info.name: info.available for info in backends()}["cpu"]:
        pytest.skip("no cpu backend here")
    peak = cpu_processor.PopcountPeak(isa="avx2", macs_per_second=1e12, macs_per_clock=None)
    monkeypatch.setattr(cpu_processor, "popcount_peak", lambda: peak)
    monkeypatch.setenv("BIPER_NUM_THREADS", "3")
    with use_backend("cpu"):
        report = classifier().profile(images, rounds=1)
    assert (report.threads, report.peak_macs_per_second, report.isa) == (3, 3e12, "avx2")
    with use_backend("reference"):
        report = classifier().profile(images, rounds=1)
    assert report.threads == torch.get_num_threads()
    assert report.peak_macs_per_second is report.isa is None


def test_the_input_is_checked_as_in_a_call(images: Tensor) -> None:
    with pytest.raises(ValueError, match="converted for images of 3x8x8"):
        classifier().profile(images[..., :7])
    with pytest.raises(ValueError, match=r"`rounds` \(=0\) must be 1 or more"):
        classifier().profile(images, rounds=0)
