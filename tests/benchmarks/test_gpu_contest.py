"""Whole networks of the GPU check, on a CPU: checked first, then timed, and what fails is named."""

import json
from pathlib import Path
from typing import Any

import gpu_contest
import gpu_networks
import gpu_prepare
import pytest
import torch
from gpu_budget import Deadline
from gpu_contest import Ours, agreeing, check, our_contenders, run_compiled, run_ours
from gpu_prepare import BINARY, FLOAT, Prepared, accepted, prepare, rivals_by_importance
from torch import nn

from biper_engine.bench import Budget
from biper_engine.nn import BinaryConv2d
from biper_engine.ops import backends
from biper_engine.runtime import plan

CPU = torch.device("cpu")
OURS = (("reference", "float32"), ("reference", "float16"))


class Small(nn.Module):
    input_shape = (3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.conv = BinaryConv2d(32, 32, 3, padding=1, frequency=20.0, stage=2)
        self.norm = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardtanh(self.stem(x))
        x = nn.functional.hardtanh(self.norm(self.conv(x)) + x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(_name: str) -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def small() -> Prepared:
    return prepare(BINARY[0], build)


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a function that reads what was appended; one turn of each contestant."""
    monkeypatch.setenv("GPU_RUN", str(tmp_path))
    monkeypatch.delenv("BIPER_BACKEND", raising=False)
    once = Budget(seconds=0, fewest=1, most=1, warmup=0)
    monkeypatch.setattr(gpu_contest, "BUDGET", once)
    monkeypatch.setattr(gpu_contest, "BEST", "reference float16")
    monkeypatch.setattr(gpu_contest, "FEWER_IMAGES", 16)

    def read() -> list[dict[str, Any]]:
        text = (tmp_path / gpu_contest.LINES).read_text("utf-8")
        return [json.loads(line) for line in text.splitlines()]

    return read


def test_a_prepared_network_survives_its_file(small: Prepared, tmp_path: Path) -> None:
    path = gpu_prepare.file_of("a/b", tmp_path)
    gpu_prepare.save(small, path)
    again = gpu_prepare.load(path)
    images = torch.randn(2, *small.input_shape)
    with torch.no_grad():
        for stream in gpu_prepare.STREAMS:
            assert torch.equal(again.engines[stream](images), small.engines[stream](images))
        assert torch.equal(again.twin(images)[0], small.twin(images)[0])
    assert again.kernels == small.kernels
    assert again.input_shape == (3, 6, 6)
    work = json.loads((tmp_path / "a-b.kernels.json").read_text("utf-8"))
    assert [entry["name"] for entry in work["kernels"]] == [one.name for one in small.kernels]


def test_contestants_are_checked_then_timed_and_those_that_cannot_run_say_why(
    small: Prepared, lines: Any
) -> None:
    ours = (*OURS, ("cuda", "float16"))
    if {info.name: info.available for info in backends.backends()}["cuda"]:
        pytest.skip("cuda runs here")
    with torch.inference_mode():
        assert run_ours(small, [1, 3], CPU, "cuda", ours)
    checks, *contests = lines()
    assert checks["nodes"]["reference float32"] == [2, []]
    assert checks["images"] == {"reference": [32, 32]}
    same, tried = checks["top1"]["reference float16"]
    assert 0 <= same <= tried == 16
    assert "cuda" in checks["reasons"]["cuda float16"]
    assert [line["batch"] for line in contests] == [1, 3]
    for line in contests:
        wanted = {"reference float32", "reference float16", "eager float16"}
        assert set(line["taken"]) == wanted
        assert "cuda" in line["did_not_run"]["cuda float16"]


def test_two_backends_of_a_stream_keep_their_plans_from_turn_to_turn(
    small: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    own = plan._plan

    def counted(*words: Any) -> plan.Plan:
        made.append(words)
        return own(*words)

    monkeypatch.setattr(plan, "_plan", counted)
    reasons: dict[str, str] = {}
    pair = (("reference", "float16"), ("cpu", "float16"))
    with torch.inference_mode():
        found = our_contenders(small, torch.randn(2, *small.input_shape), reasons, pair)
        assert reasons == {}
        assert len(made) == 2
        for _ in range(3):
            for one in found.contenders:
                with one.around():
                    one.call()
    assert len(made) == 2


def test_how_ours_runs_is_recorded_and_told_where_it_is_no_graph(
    small: Prepared, lines: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.inference_mode():
        assert run_ours(small, [2], CPU, "cuda", OURS)
    *_, line = lines()
    assert set(line["execution"]) == {"reference float32", "reference float16"}
    text = line["execution"]["reference float16"]
    assert text.startswith("operator by operator, since ")
    assert f"{BINARY[0]}, batch 2: reference float16 runs {text}\n" in capsys.readouterr().out


def test_a_graph_is_one_only_if_its_shape_has_it() -> None:
    captured = "one CUDA graph of 3 operators per input shape (1 captured)"
    refused = "operator by operator, since capturing a CUDA graph failed: no"
    large = f"{captured}, operator by operator for 1 shape, since memory is short"
    found = Ours(executions={"a": captured, "b": refused, "c": large})
    assert found.uncaptured() == {"b": refused, "c": large}


def test_a_wrong_operator_keeps_its_backend_from_being_timed(
    small: Prepared, lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from biper_engine import serialization
    from biper_engine.serialization.reports import BackendReport, NodeReport

    def wrong(*_args: Any, **_options: Any) -> BackendReport:
        nodes = (NodeReport("conv", "bconv2d_float", "reference", 3, 9, 1.0),)
        return BackendReport(backend="reference", nodes=nodes)

    monkeypatch.setattr(serialization, "check_backend", wrong)
    with torch.inference_mode():
        assert not run_ours(small, [1], CPU, "cuda", OURS)
    checks, line = lines()
    assert checks["reasons"]["reference float16"] == "WRONG: 1 of 1 operators, conv (3 of 9)"
    assert set(line["taken"]) == {"eager float16"}


def test_an_exact_network_with_other_answers_is_wrong(
    small: Prepared, monkeypatch: pytest.MonkeyPatch, lines: Any
) -> None:
    del lines
    monkeypatch.setattr(gpu_contest, "agreeing", lambda got, _wanted: (3, len(got)))
    with torch.inference_mode():
        found = check(small, CPU, OURS)
    assert found.reasons == {"reference float32": "WRONG: it agrees on 3 of 32 images only"}


def test_images_agree_by_the_norm_of_their_outputs() -> None:
    wanted = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.3, 0.4]])
    assert agreeing(wanted + torch.tensor([4e-4, 0.0]), wanted) == (2, 3)
    assert agreeing(torch.full_like(wanted, torch.nan), wanted) == (0, 3)


def test_images_have_the_stream_s_dtype_where_the_engine_takes_it(small: Prepared) -> None:
    images = torch.randn(2, *small.input_shape)
    with torch.no_grad():
        taken = accepted(small.engines["float16"], images, "float16")
    assert taken.dtype in (torch.float16, torch.float32)

    class Picky:
        def __call__(self, images: torch.Tensor) -> None:
            if images.dtype != torch.float32:
                raise TypeError("float32 only")

    assert accepted(Picky(), images, "float16") is images  # type: ignore[arg-type]


def test_a_rival_that_does_not_compile_is_recorded(
    small: Prepared, lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", broken)
    with torch.inference_mode():
        assert not run_compiled(small, 2, "float16", CPU, warm=False)
    assert lines() == [
        {
            "kind": "failed",
            "network": BINARY[0],
            "batch": 2,
            "rival": "compile float16",
            "reason": "no compiler",
        }
    ]


def test_a_compiled_rival_is_timed_beside_our_best_and_eager(
    small: Prepared, lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def compiled(network: Any, **options: Any) -> Any:
        modes.append(options)
        return network

    monkeypatch.setattr(torch, "compile", compiled)
    with torch.inference_mode():
        assert run_compiled(small, 2, "bfloat16", CPU, warm=False)
    (line,) = lines()
    assert set(line["taken"]) == {"reference float16", "compile bfloat16", "eager float16"}
    assert set(line["execution"]) == {"reference float16"}
    assert line["difference"] == 0.0
    assert modes == [{"mode": "max-autotune", "dynamic": False}]


def test_the_most_important_parts_come_first_and_all_are_there() -> None:
    names = [part.name for part in gpu_networks.parts()]
    first = "imagenet/resnet18_1w1a"
    assert names[0] == f"{first}, batch 256, 1, 64, 8, 1024, cuda"
    assert names[1] == f"{first}, batch 256, compile float16"
    assert names[2] == f"{first}, batch 1, compile float16"
    assert len(set(names)) == len(names)
    compiled = len(rivals_by_importance())
    assert compiled == 2 * len(gpu_prepare.BATCHES) * len(gpu_prepare.NETWORKS)
    assert len(names) == compiled + 2 * len(BINARY) + len(FLOAT)
    words = {part.name: part.words for part in gpu_networks.parts()}
    assert words[names[1]] == [first, "--batch", "256", "--compile", "float16"]
    assert words[f"{first}, batch 256, 1, 64, 8, 1024, triton"][-1] == "--triton"
    for part in gpu_networks.parts():
        gpu_contest.arguments(part.words)


def test_parts_that_fail_are_named_and_those_behind_them_still_run() -> None:
    clock = [0.0]
    todo = list(gpu_networks.parts())[:4]

    def run(part: gpu_networks.Part) -> str | None:
        clock[0] += 30.0
        return "stopped after 3 s" if part is todo[1] else None

    deadline = Deadline(100.0, lambda: clock[0])
    skipped, failed = gpu_networks.measure(todo, deadline, run)
    assert failed == {todo[1].name: "stopped after 3 s"}
    assert skipped == {todo[3].name: "needs 25 s, 10 s were left"}
