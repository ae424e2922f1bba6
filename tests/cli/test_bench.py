"""`biper bench`, on a tiny network and tiny budgets."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

import biper_engine
from biper_engine.bench import (
    Comparison,
    Contest,
    Rates,
    Samples,
    StreamContest,
    Throughput,
    streams,
)
from biper_engine.bench.rivals import rival
from biper_engine.cli.bench_tables import (
    _contest_rows,
    bench_notes,
    bench_table,
    stream_notes,
    stream_table,
)
from biper_engine.ops.backends import backends

from .conftest import Biper

QUICK = ("--no-compile", "--seconds", "0")
CPU = {info.name: info.available for info in backends()}["cpu"]


def test_a_model_is_checked_then_timed(biper: Biper, user_directory: Path) -> None:
    done = biper("bench", "tinynet:with_metadata", *QUICK, "-b", "1", "-b", "3")
    assert done.code == 0, done.err
    assert "1 of 1 binary layers equal the float network's" in done.out
    assert "x as fast" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert not list(user_directory.glob("*.biper"))


def test_json_has_every_sample_and_the_machine(biper: Biper, user_directory: Path) -> None:
    done = biper("bench", "tinynet:build", "--input", "1,3,16,16", *QUICK, "-b", "2", "--json")
    values = json.loads(done.out)
    (batch,) = values["batches"]
    assert batch["batch"] == 2
    assert set(batch["contestants"]) == {"float, eager", "engine"}
    assert len(batch["contestants"]["engine"]["samples_ms"]) >= 5
    assert values["machine"]["processor"]
    assert values["profiles"] == []


def test_a_file_is_compared_with_the_model_it_came_from(biper: Biper, tiny: Path) -> None:
    done = biper("bench", tiny, "--against", "tinynet:with_metadata", *QUICK)
    assert done.code == 0, done.err
    assert "1 of 1 binary layers equal" in done.out


def test_a_file_of_unknown_origin_asks_for_its_model(biper: Biper, tiny: Path) -> None:
    done = biper("bench", tiny, *QUICK)
    assert done.code == 2
    assert "--against" in done.err


@pytest.mark.deep
def test_a_file_of_a_known_network_gets_a_twin(biper: Biper, tmp_path: Path) -> None:
    network = biper_engine.models.build("cifar10/resnet20_1w1a", num_classes=7)
    biper_engine.convert(network, check=False).save(tmp_path / "seven.biper")
    done = biper("bench", tmp_path / "seven.biper", *QUICK, "-b", "1")
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    assert "operators equal the reference" in said
    assert "cifar10/resnet20_1w1a with random weights: the same work, different answers" in said


def test_an_engine_that_differs_is_not_timed(biper: Biper, tiny: Path) -> None:
    done = biper("bench", tiny, "--against", "tinynet:half_binary", *QUICK)
    assert done.code == 1
    assert "Nothing was timed" in done.err
    assert "x as fast" not in done.out


def test_the_profile_has_every_layer(biper: Biper, user_directory: Path) -> None:
    done = biper("bench", "tinynet:with_metadata", *QUICK, "-b", "1", "--profile")
    assert "operator" in done.out
    assert ("popcounts on registers" in done.out) == CPU
    assert max(map(len, done.out.splitlines())) <= 80
    forced = biper(
        *("bench", "tinynet:with_metadata", *QUICK, "-b", "1", "--profile", "--json"),
        *("--backend", "reference"),
    )
    values = json.loads(forced.out)
    ran = {node["backend"] for node in values["profiles"][0]["nodes"]}
    assert ran == {"torch", "reference"}
    assert values["profiles"][0]["peak_macs_per_second"] is None
    assert values["engine_backends"] == ["reference"]


def test_threads_that_contradict_the_environment_are_refused(
    biper: Biper, user_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIPER_NUM_THREADS", "3")
    done = biper("bench", "tinynet:with_metadata", *QUICK, "--threads", "2")
    assert done.code == 2
    assert "BIPER_NUM_THREADS=3" in done.err


def test_against_is_for_files(biper: Biper, user_directory: Path) -> None:
    done = biper("bench", "tinynet:with_metadata", "--against", "tinynet:build", *QUICK)
    assert done.code == 2
    assert "--against is for .biper files" in " ".join(done.err.split())


@pytest.mark.deep
def test_a_known_network_takes_random_weights(biper: Biper) -> None:
    done = biper(
        *("bench", "cifar10/resnet20_1w1a", "--no-compile", "--rounds", "2"),
        *("-b", "1", "--threads", "1", "--json"),
    )
    assert done.code == 0, done.err
    values = json.loads(done.out)
    assert values["threads"] == values["machine"]["torch_threads"] == 1
    (batch,) = values["batches"]
    assert {len(c["samples_ms"]) for c in batch["contestants"].values()} == {2}
    assert values["checked"].startswith("18 of 18 binary layers equal")


def test_the_backend_that_ran_is_named(biper: Biper, user_directory: Path) -> None:
    words = ("bench", "tinynet:with_metadata", *QUICK, "-b", "1", "--threads", "1")
    assert "engine on: reference" in biper(*words, "--backend", "reference").out
    usual = biper(*words).out
    assert ("engine on: cpu (" in usual) == CPU
    assert "1 thread each" in usual


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["cifar10/resnet99"], 1, "Unknown network 'cifar10/resnet99'. Did you mean"),
        (["cifar10/resnet20_1w1a", "--stage", "2"], 2, "are for files"),
        (["tiny.biper", "--input", "1,3,16,16"], 2, "--input is not for a .biper file"),
        (["tiny.biper", "--frequency", "20"], 2, "are for --against"),
        (["tinynet:with_metadata", "--threads", "9999"], 2, "Ask for"),
        (["tinynet:build"], 2, "--input 1,3,224,224"),
        (["tinynet:with_metadata", "--backend", "referense"], 1, "Did you mean 'reference'?"),
        (["gone.biper"], 1, "gone.biper"),
        (["tinynet:with_metadata", "--streams", "--rivals"], 2, "leave out --rivals"),
        (
            ["tinynet:with_metadata", "--streams", "--profile"],
            2,
            "leave out --rivals and --profile",
        ),
        (["tinynet:half_binary"], 1, "No binary layer"),
    ],
)
def test_errors(biper: Biper, tiny: Path, words: list[str], code: int, message: str) -> None:
    if "--threads" in words and not CPU:
        pytest.skip("without the cpu backend an engine has torch's threads")
    done = biper("bench", *words, *QUICK)
    assert done.code == code
    assert done.out == ""
    assert message in " ".join(done.err.replace("│", " ").split())


def test_a_rival_without_a_result_is_reported_with_its_reason() -> None:
    contest = Contest(
        batch=4,
        samples={"float, eager": Samples((8.0,)), "engine": Samples((2.0,))},
        reasons={"float, torch.compile": "no compiler"},
        differences={},
    )
    assert _contest_rows(contest) == [
        ("4", "float, eager", "8.000", "8.000 - 8.000", "500", "4.0x as fast"),
        ("4", "engine", "2.000", "2.000 - 2.000", "2,000", ""),
        ("4", "float, torch.compile", "", "did not run", "", ""),
    ]
    comparison = Comparison(threads=1, settings={}, contests=(contest, contest), machine={})
    assert bench_notes(comparison) == ["float, torch.compile did not run: no compiler"]


def test_a_contestant_that_the_others_disturb_is_noted() -> None:
    contest = Contest(
        batch=4,
        samples={"OpenVINO f32": Samples((8.0,)), "engine": Samples((2.0,))},
        reasons={},
        differences={"OpenVINO f32": 1e-7},
        beside={"OpenVINO f32": "the float twin"},
        alone_ms={"OpenVINO f32": 6.4, "engine": 1.95},
    )
    comparison = Comparison(threads=1, settings={}, contests=(contest,), machine={})
    assert bench_notes(comparison) == [
        "OpenVINO f32: outputs within 1.0e-07 of the float twin's, over the largest one",
        "OpenVINO f32, batch 4: 8.000 ms in turn, 6.400 ms alone (+25%)",
    ]


def test_rivals_that_are_not_installed_are_named(
    biper: Biper, user_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rival, "find_spec", lambda _: None)
    words = ("bench", "tinynet:with_metadata", "--rivals", "--no-compile", "--rounds", "1")
    done = biper(*words, "-b", "1")
    assert done.code == 0, done.err
    assert "OpenVINO binary f32 did not run: openvino not installed; pip install" in done.out
    values = json.loads(biper(*words, "-b", "2", "--json").out)
    (batch,) = values["batches"]
    ran = {"float, eager", "PyTorch f32", "engine"}
    assert set(batch["alone_ms"]) == set(batch["contestants"]) == ran
    assert len(batch["did_not_run"]) == 7


@pytest.fixture
def quick_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten slices, and leave the rivals out as if they were not installed."""
    monkeypatch.delenv("BIPER_NUM_THREADS", raising=False)
    monkeypatch.setattr(rival, "find_spec", lambda _: None)
    short = partial(streams.throughput, slice_seconds=0.01, warmup_seconds=0.0)
    monkeypatch.setattr(biper_engine.bench, "throughput", short)


def test_images_per_second_are_counted_by_slices(
    biper: Biper, user_directory: Path, quick_slices: None
) -> None:
    words = ("bench", "tinynet:with_metadata", "--streams", "--threads", "1", "--rounds", "2")
    values = json.loads(biper(*words, "-b", "3", "--json").out)
    assert values["checked"].startswith("1 of 1 binary layers equal")
    assert values["callers"] == values["machine"]["torch_threads"] == 1
    (batch,) = values["batches"]
    assert batch["batch"] == 3
    assert list(batch["contestants"]) == ["engine"]
    assert len(batch["contestants"]["engine"]["slices_images_per_second"]) == 2
    assert len(batch["did_not_run"]) == 5
    assert list(values["settings"]) == ["OpenVINO int8", "OpenVINO binary f32", "ONNX Runtime int8"]


def test_streams_are_of_single_images_unless_said_otherwise(
    biper: Biper, user_directory: Path, quick_slices: None
) -> None:
    words = ("bench", "tinynet:with_metadata", "--streams", "--threads", "1", "--rounds", "1")
    done = biper(*words, "--backend", "reference")
    assert done.code == 0, done.err
    assert "1 thread each, calls at once; engine on: reference" in done.out
    assert "ONNX Runtime int8, 1 session did not run: onnx and onnxscript" in done.out
    rows = [line.split()[:2] for line in done.out.splitlines()]
    assert rows.count(["1", "engine"]) == 1
    assert not [row for row in rows if row[1:] == ["engine"] and row[0] != "1"]


def test_callers_with_more_threads_than_one_are_refused(
    biper: Biper, user_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIPER_NUM_THREADS", "2")
    done = biper("bench", "tinynet:with_metadata", "--streams", "--threads", "2")
    assert done.code == 2
    assert "BIPER_NUM_THREADS=2 gives the engine another number" in " ".join(
        done.err.replace("│", " ").split()
    )


def stream_contest(processors: float) -> Throughput:
    names = ("OpenVINO binary f32, 1 stream", "OpenVINO binary f32, 16 streams", "engine")
    contest = StreamContest(
        batch=8,
        rates={
            name: Rates((1e5 * i, 2e5 * i, 3e5 * i), (processors,) * 3)
            for i, name in enumerate(names, 1)
        },
        at_once=dict.fromkeys(names, 2),
        ways={"OpenVINO binary f32": names[:2]},
        reasons={},
        differences={names[0]: 1e-7},
        beside={names[0]: "the engine"},
    )
    return Throughput(
        callers=2,
        slice_seconds=1.0,
        settings={"OpenVINO binary f32": "the engine's graph"},
        contests=(contest,),
        machine={"cpu_backend": "avx512, 1 thread"},
    )


def test_the_table_of_streams_has_every_way_and_fits_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(stream_table(stream_contest(2.0), ["cpu"]))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert lines[0] == "2 threads each, calls at once; engine on: cpu (avx512, 1 thread)"
    assert "8 OpenVINO binary f32, 16 streams 400,000 300,000-500,000 1.5x" in lines
    assert "8 engine 600,000 450,000-750,000" in lines


def test_callers_without_a_processor_each_are_noted() -> None:
    checks = [
        "OpenVINO binary f32, 1 stream: "
        "outputs within 1.0e-07 of the engine's, over the largest one"
    ]
    assert stream_notes(stream_contest(1.95)) == checks
    assert stream_notes(stream_contest(1.5)) == [
        *checks,
        "engine, batch 8: 2 callers had only 1.50 processors; stop other work on the machine and "
        "count again",
    ]


def test_the_table_fits_80_columns_and_the_largest_difference_is_noted() -> None:
    names = ("float, eager", "float, torch.compile", "engine")
    contests = tuple(
        Contest(
            batch=batch,
            samples={name: Samples((1234.5678, 2345.6789)) for name in names},
            reasons={},
            differences={"float, torch.compile": batch * 1e-7},
        )
        for batch in (1, 256)
    )
    machine = {"cpu_backend": "avx512, 2 threads"}
    settings = dict.fromkeys(names[:2], "float32, channels_last, freezing, static shapes")
    comparison = Comparison(threads=2, settings=settings, contests=contests, machine=machine)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(bench_table(comparison, ["cpu"]))
    lines = console.export_text().splitlines()
    assert sum("torch.compile  1790.1  1512.3 - 2067.9" in line for line in lines) == 2
    assert "engine on: cpu (avx512, 2 threads)" in lines[0]
    (note,) = bench_notes(comparison)
    assert "outputs within 2.6e-05 of eager's" in note


def test_the_help_fits_on_one_screen(biper: Biper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = biper("bench", "--help").out.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 80
