import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from biper_engine.bench import (
    Budget,
    Rival,
    compare,
    compiled_rival,
    eager_rival,
    machine,
    machine_facts,
)
from biper_engine.bench import comparison as module
from biper_engine.bench.rivals import compiled_bf16_rival
from biper_engine.bench.rivals.pytorch import eager_twin_rival
from biper_engine.engine import Engine
from tests.images import images
from tests.networks_by_hand import classifier

ONCE = Budget(seconds=0.0, fewest=2, most=2, warmup=0)


class Float(nn.Module):
    """Stands for the float network: an engine's graph on the reference."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.graph = engine.graph_module

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.graph(images)[0]
        return result


@pytest.fixture
def engine() -> Engine:
    return classifier()


def test_every_contestant_is_timed_at_every_batch_size(engine: Engine) -> None:
    found = compare(
        engine, Float(engine), [images(1), images(5)], compiled=False, budget=ONCE, threads=1
    )
    assert found.threads == 1
    assert [contest.batch for contest in found.contests] == [1, 5]
    for contest in found.contests:
        assert list(contest.samples) == ["float, eager", "engine"]
        assert all(len(samples.ms) == 2 for samples in contest.samples.values())
        assert contest.differences == {}
        rival, ours = contest.samples["float, eager"], contest.samples["engine"]
        assert contest.times_as_fast("float, eager") == rival.median_ms / ours.median_ms
    values = json.loads(json.dumps(found.to_dict()))
    assert values["machine"]["torch"] == torch.__version__
    assert set(values["batches"][0]["contestants"]) == {"float, eager", "engine"}
    assert set(values["batches"][0]["engine_times_as_fast"]) == {"float, eager"}


def test_the_number_of_threads_is_for_all_and_restored(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Watched(Float):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return super().forward(images)

    before = torch.get_num_threads()
    monkeypatch.setenv("BIPER_NUM_THREADS", str(before + 1))  # on any number of processors
    compare(engine, Watched(engine), [images(1)], compiled=False, budget=ONCE, threads=before + 1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match=r"`threads` \(=0\) must be 1 or more"):
        compare(engine, Float(engine), [images(1)], threads=0)


def test_a_rival_that_does_not_run_is_named_with_its_reason(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Rival:
        return Rival(name="float, torch.compile", how="somehow", reason="no C++ compiler")

    monkeypatch.setattr(module, "compiled_rival", failing)
    found = compare(engine, Float(engine), [images(1)], budget=ONCE)
    assert found.contests[0].reasons == {"float, torch.compile": "no C++ compiler"}
    assert "float, torch.compile" not in found.contests[0].samples
    assert found.settings["float, torch.compile"] == "somehow"


def test_a_rivals_distance_from_the_eager_network_is_reported(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(model: nn.Module, images: Tensor) -> Rival:
        return Rival(name="float, torch.compile", how="", call=lambda x: 2 * model(x))

    monkeypatch.setattr(module, "compiled_rival", doubled)
    (contest,) = compare(engine, Float(engine), [images(2)], budget=ONCE).contests
    assert contest.differences == {"float, torch.compile": 1.0}


def test_what_else_would_be_deployed_is_timed_in_turn_and_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deployed(ours: Engine, networks: object, images: Tensor, threads: int) -> list[Rival]:
        assert threads == 1
        assert torch.is_inference_mode_enabled()
        return [
            Rival(
                name="b",
                how="bits",
                call=lambda x: 2 * ours(x),
                wanted=ours,
                beside="engine",
                agreed=(7, 8),
            ),
            Rival(name="gone", how="", reason="not installed"),
        ]

    def captured(model: nn.Module, images: Tensor) -> object:
        assert not torch.is_inference_mode_enabled()
        return object()

    monkeypatch.setattr(module, "deployed_rivals", deployed)
    monkeypatch.setattr(module.FloatNetworks, "of", captured)
    budget = replace(ONCE, pause_ms=0.1, ahead=1)
    found = compare(
        *(engine, Float(engine), [images(2)]),
        threads=1,
        compiled=False,
        deployed=True,
        budget=budget,
    )
    (contest,) = found.contests
    assert list(contest.samples) == list(contest.alone_ms) == ["float, eager", "b", "engine"]
    assert contest.reasons == {"gone": "not installed"}
    assert contest.differences == {"b": 1.0}
    assert contest.beside == {"b": "engine"}
    assert contest.agreed == {"b": (7, 8)}
    (values,) = json.loads(json.dumps(found.to_dict()))["batches"]
    assert values["images_agreed"] == {"b": [7, 8]}
    assert values["difference_from"] == {"b": "engine"}
    assert set(values["alone_ms"]) == set(contest.samples)


def test_the_bfloat16_rival_computes_what_the_network_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.dtype] = []

    def uncompiled(model: nn.Module, **_: Any) -> nn.Module:
        model.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        return model

    monkeypatch.setattr(torch, "compile", uncompiled)
    network = nn.Conv2d(3, 8, 3)
    rival = compiled_bf16_rival(network, images(2))
    bound = rival.bound(images(2))
    torch.testing.assert_close(bound().float(), network(images(2)), rtol=0.05, atol=0.05)
    assert set(seen) == {torch.bfloat16}
    assert network.weight.dtype == torch.float32


def test_the_eager_twin_is_checked_and_in_channels_last() -> None:
    twin = torch.fx.symbolic_trace(_Tuple())
    rival = eager_twin_rival(twin, images(2))
    assert rival.agreed == (8, 8)
    # The twin's own layout is another, and so is the order of its sums on some processors.
    torch.testing.assert_close(rival.bound(images(2))(), twin(images(2))[0])
    assert twin.layer.weight.is_contiguous()


class _Tuple(nn.Module):
    """Returns a tuple, as captured networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.layer(images),)


def test_everything_runs_in_inference_mode(engine: Engine) -> None:
    seen: set[bool] = set()

    class Watched(Float):
        def forward(self, images: Tensor) -> Tensor:
            seen.add(torch.is_inference_mode_enabled())
            return super().forward(images)

    compare(engine, Watched(engine), [images(1)], compiled=False, budget=ONCE)
    assert seen == {True}
    assert not torch.is_inference_mode_enabled()


def test_the_eager_rival_is_a_channels_last_copy() -> None:
    model = nn.Conv2d(3, 8, 3)
    rival = eager_rival(model)
    assert model.weight.is_contiguous()
    assert isinstance(rival.call, nn.Conv2d)
    assert rival.call.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(rival.call.weight, model.weight)


def test_a_model_that_does_not_compile_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, **_: Any) -> nn.Module:
        class Broken(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                raise RuntimeError("g++: not found\nand more")

        return Broken()

    monkeypatch.setattr(torch, "compile", broken)
    rival = compiled_rival(nn.Conv2d(3, 8, 3), images(1))
    assert rival.call is None
    assert rival.reason == "g++: not found"


@pytest.mark.deep
def test_without_a_compiler_the_reason_is_that(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler"), "compile_threads": 1}):
        rival = compiled_rival(nn.Conv2d(3, 8, 3), images(1))
    assert rival.call is None
    assert "No working C++ compiler" in rival.reason
    assert config.freezing is False


@pytest.mark.deep
def test_the_compiled_rival_computes_what_the_model_does() -> None:
    from torch._dynamo.utils import counters
    from torch._inductor import config

    counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    batch = images(2).contiguous(memory_format=torch.channels_last)
    rival = compiled_rival(model, batch)
    if rival.call is None:
        pytest.skip(f"torch.compile does not run here: {rival.reason}")
    assert config.freezing is False
    compiled = dict(counters["frames"])
    with torch.inference_mode():
        torch.testing.assert_close(rival.call(batch), model(batch))
    assert counters["inductor"]["binary_folding_conv"] > 0, "freezing did not fold BatchNorm"
    assert counters["frames"] == compiled == {"total": 1, "ok": 1}, "it was compiled again"


CPUINFO = "processor : 0\nmodel name : Some CPU @ 2 GHz\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (CPUINFO, "Some CPU @ 2 GHz"),
        (f"{CPUINFO}cpu family : 26\nmodel : 2\n", "Some CPU @ 2 GHz, family 26 model 2"),
        ("processor : 0\nCPU implementer : 0x41\n", None),
        (None, None),
    ],
)
def test_the_processor_has_its_own_name_where_the_system_tells_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, name: str | None
) -> None:
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(machine, "Path", lambda _: path)
    assert machine_facts()["processor"] == (name or platform.processor() or platform.machine())


def test_settings_of_the_environment_are_told_where_they_are_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.delenv("BIPER_CPU_ISA", raising=False)
    told = machine_facts()["environment"]
    assert told["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert "BIPER_CPU_ISA" not in told


def test_the_facts_of_the_machine_are_json_values() -> None:
    facts = machine_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert {"processor", "torch_threads", "cpu_count", "python"} <= set(facts)
