from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

import pytest
import rivals


def values(**contest: Any) -> dict[str, Any]:
    """Return what `biper bench` prints, of one batch."""
    given = {"batch": 1, "kernels": {}, "did_not_run": {}, **contest}
    machine = {"cpu_backend": "avx2, 2 threads", "torch_cpu_capability": "AVX2"}
    return {"machine": machine, "batches": [given]}


def test_rivals_with_wider_kernels_or_without_a_limit_are_named() -> None:
    contestants = dict.fromkeys(("engine", "float, eager", "ov int8", "ov bin", "ONNX Runtime f32"))
    kernels = {
        "ov int8": {"Convolution jit_avx2_I8": 19},
        "ov bin": {"BinaryConvolution jit_avx512_u1": 16, "Pooling jit_avx2_f32": 1},
    }
    found = rivals.beyond(values(contestants=contestants, kernels=kernels), "avx2")
    assert found == {
        "ov bin": "16 x BinaryConvolution jit_avx512_u1",
        "ONNX Runtime f32": "ONNX Runtime takes what the processor has; it has no setting",
    }


@pytest.mark.parametrize(
    "machine",
    [
        {"cpu_backend": "avx512, 2 threads", "torch_cpu_capability": "AVX2"},
        {"cpu_backend": "avx2, 2 threads", "torch_cpu_capability": "AVX512"},
        {"torch_cpu_capability": "AVX2"},
    ],
)
def test_an_engine_or_a_pytorch_beyond_the_limit_is_an_error(machine: dict[str, str]) -> None:
    with pytest.raises(RuntimeError, match="avx2 was requested, but the engine has"):
        rivals.beyond({**values(contestants={}), "machine": machine}, "avx2")


def test_the_child_has_the_environment_and_the_file_says_what_it_did_not_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = """
import json, os
kernels = {"b": {"Convolution jit_avx512_u1": 2}}
machine = {"cpu_backend": os.environ["BIPER_CPU_ISA"] + ", 1 thread"}
machine["torch_cpu_capability"] = os.environ["ATEN_CPU_CAPABILITY"].upper()
machine["environment"] = {"onednn": os.environ["ONEDNN_MAX_CPU_ISA"]}
batch = {"contestants": {"engine": {}, "b": {}}, "kernels": kernels}
print(json.dumps({"machine": machine, "batches": [batch]}))
"""
    monkeypatch.setattr(rivals, "MAIN", program)
    found = rivals.measure("a/network", ["--rivals"], "avx2")
    assert list(found)[:2] == ["isa", "beyond_the_isa"]
    assert found["isa"] == "avx2"
    assert found["beyond_the_isa"] == {"b": "2 x Convolution jit_avx512_u1"}
    assert found["machine"]["environment"] == {"onednn": "AVX2"}


def options(monkeypatch: pytest.MonkeyPatch, *words: str) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["rivals.py", "a/network", "--machine", "m", *words])
    return rivals.arguments()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            [],
            [
                (
                    f"rivals-a-network-{n}t-m.json",
                    f"--rivals 20.0 --batch 1 --batch 8 --threads {n}",
                )
                for n in (1, 2)
            ],
        ),
        (["--streams"], [("streams-a-network-m.json", "--streams 60.0 --batch 1")]),
        (
            ["--threads", "2", "--batch", "1", "--isa", "avx2", "--seconds", "9"],
            [("rivals-a-network-2t-avx2-m.json", "--rivals 9.0 --batch 1 --threads 2")],
        ),
    ],
)
def test_a_file_is_named_by_what_is_measured(
    monkeypatch: pytest.MonkeyPatch, words: list[str], expected: list[tuple[str, str]]
) -> None:
    found = list(rivals.runs(options(monkeypatch, *words)))
    assert [network for network, _, _ in found] == ["a/network"] * len(expected)
    told = [
        (name, " ".join(word for word in given if word != "--seconds")) for _, name, given in found
    ]
    assert told == expected


def test_a_line_has_times_or_images_per_second_and_what_went_beyond() -> None:
    timed = values(
        contestants={"b": {"median_ms": 6.0}, "engine": {"median_ms": 2.0}},
        engine_times_as_fast={"b": 3.0},
        did_not_run={"c": "gone"},
    )
    assert rivals.summary({**timed, "beyond_the_isa": {"b": "2 x wide"}}) == [
        "  batch 1: b 6.000 ms (3.00x); engine 2.000 ms; c did not run",
        "  beyond: b, 2 x wide",
    ]
    rate = {"median_images_per_second": 1234.5, "processors_used": 1.96}
    counted = values(
        contestants={"b, 1 stream": rate, "b, 2 streams": rate, "engine": rate},
        best={"b": "b, 2 streams"},
        engine_times_as_fast={"b": 1.0},
    )
    assert rivals.summary(counted) == [
        "  batch 1: b, 1 stream 1,234 images/s on 2.0 processors; b, 2 streams 1,234 images/s on "
        "2.0 processors (1.00x); engine 1,234 images/s on 2.0 processors"
    ]


def test_a_try_that_fails_loses_none_of_those_before_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    left = iter([{"try": 1}, {"try": 2}, RuntimeError("no memory"), {"try": 4}])

    def run() -> dict[str, int]:
        values = next(left)
        if isinstance(values, RuntimeError):
            raise values
        return values

    assert list(rivals.attempts(run, 5)) == [{"try": 1}, {"try": 2}]
    assert "try 3 failed" in capsys.readouterr().out
    assert list(rivals.attempts(run, 0)) == [{"try": 4}]
    with pytest.raises(RuntimeError, match="no cpu"):
        next(rivals.attempts(lambda: (_ for _ in ()).throw(RuntimeError("no cpu")), 3))
