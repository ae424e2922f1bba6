import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine.bench import Budget, Rival, StreamContest, Throughput, streams, throughput
from biper_engine.bench.callers import Streams
from biper_engine.bench.streams import Rates
from biper_engine.engine import Engine
from biper_engine.errors import BackendUnavailableError
from biper_engine.ops import cpu_threads
from biper_engine.ops.backends import backends
from tests.networks_by_hand import classifier

CPU = {info.name: info.available for info in backends()}["cpu"]
QUICK = Budget(seconds=0.0, fewest=3, most=3, pause_ms=0.0)
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Fake(Streams):
    """Two streams with rates that were thought of before."""

    at_once = 2

    def __init__(self, outputs: list[Tensor], rates: list[float]) -> None:
        self._outputs, self._rates = outputs, iter(rates)

    def __call__(self) -> list[Tensor]:
        return self._outputs

    def rate(self, seconds: float, warmup_seconds: float) -> float:
        assert (seconds, warmup_seconds) == (0.01, 0.0)
        return next(self._rates)


def fake(
    name: str, wanted: Callable[[Tensor], Tensor], outputs: list[Tensor], rates: list[float]
) -> Rival:
    return Rival(
        name=name,
        how=f"how {name}",
        call=wanted,
        bind=lambda _: Fake(outputs, rates),
        wanted=wanted,
        beside="the engine",
        agreed=(7, 8),
        kernels={"Convolution fast": 3},
    )


def measured(
    monkeypatch: pytest.MonkeyPatch,
    engine: Any,
    rivals: Callable[..., dict[str, list[Rival]]],
    callers: int = 1,
) -> Throughput:
    def captured(model: object, images: Tensor) -> object:
        assert not torch.is_inference_mode_enabled()
        return object()

    monkeypatch.delenv("BIPER_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu_threads, "thread_count", lambda: min(3, torch.get_num_threads()))
    monkeypatch.setattr(streams.FloatNetworks, "of", captured)
    monkeypatch.setattr(streams, "stream_rivals", rivals)
    return throughput(
        *(engine, torch.nn.Identity(), [IMAGES]),
        callers=callers,
        budget=QUICK,
        slice_seconds=0.01,
        warmup_seconds=0.0,
    )


@pytest.fixture
def engine() -> Engine:
    return classifier()


def test_the_best_of_the_ways_of_a_program_counts(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = engine(IMAGES)

    def rivals(ours: Engine, networks: object, images: Tensor, threads: int) -> dict[str, Any]:
        assert (ours, threads) == (engine, 1)
        assert torch.is_inference_mode_enabled()
        return {
            "a": [
                fake("a, 1 stream", ours, [right, right], [5.0, 1.0, 4.0]),
                fake("a, 2 streams", ours, [right, 2 * right], [6.0, 2.0, 7.0]),
                Rival(name="a, 4 streams", how="", reason="too many"),
            ],
            "gone": [Rival(name="gone, 1 stream", how="", reason="not installed")],
        }

    found = measured(monkeypatch, engine, rivals)
    (contest,) = found.contests
    assert contest.batch == 2
    assert contest.rates["a, 2 streams"].images_per_second == (12.0, 4.0, 14.0)
    assert contest.rates["a, 2 streams"].median == 12.0
    assert contest.best() == {"a": "a, 2 streams"}
    assert contest.at_once == {"a, 1 stream": 2, "a, 2 streams": 2, "engine": 1}
    assert contest.differences == {"a, 1 stream": 0.0, "a, 2 streams": 1.0}
    assert contest.reasons == {"a, 4 streams": "too many", "gone, 1 stream": "not installed"}
    ours = contest.rates["engine"]
    assert len(ours.images_per_second) == len(ours.processors) == 3
    assert contest.times_as_fast("a, 1 stream") == ours.median / 8.0
    values = json.loads(json.dumps(found.to_dict()))
    assert values["settings"] == {"a": "how a, 1 stream", "gone": ""}
    assert values["machine"]["torch_threads"] == values["callers"] == 1
    (batch,) = values["batches"]
    assert batch["engine_times_as_fast"] == {"a": ours.median / 12.0}
    assert batch["contestants"]["a, 1 stream"]["slices_images_per_second"] == [10.0, 2.0, 8.0]
    assert batch["kernels"]["a, 1 stream"] == {"Convolution fast": 3}
    assert batch["images_agreed"]["a, 2 streams"] == [7, 8]


def test_a_stream_that_never_wrote_its_outputs_differs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = engine(IMAGES)
    unwritten = torch.full_like(right, math.nan)

    def rivals(*_: Any) -> dict[str, list[Rival]]:
        return {"a": [fake("a", engine, [right, unwritten, right], [1.0, 1.0, 1.0])]}

    (contest,) = measured(monkeypatch, engine, rivals).contests
    assert math.isnan(contest.differences["a"])


@pytest.mark.skipif(not CPU, reason="without the cpu backend an engine has torch's threads")
def test_every_caller_has_one_thread(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()

    def watched(images: Tensor) -> Tensor:
        threads.add(cpu_threads.thread_count())
        return engine(images)

    found = measured(monkeypatch, watched, lambda *_: {}, callers=3)
    assert threads == {1}
    assert found.callers == found.contests[0].at_once["engine"] == 3
    with pytest.raises(ValueError, match="4 threads are wanted"):
        throughput(engine, torch.nn.Identity(), [IMAGES], callers=4)


def test_another_number_of_threads_of_each_caller_is_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIPER_NUM_THREADS", "2")
    with pytest.raises(ValueError, match=r"1 threads .* BIPER_NUM_THREADS=2"):
        throughput(engine, torch.nn.Identity(), [IMAGES], callers=2)


def test_an_engine_that_calls_at_once_disturb_is_not_timed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([0.0, 1.0])

    def disturbed(images: Tensor) -> Tensor:
        return torch.full((1,), next(answers))

    with pytest.raises(BackendUnavailableError, match="1 concurrent calls of the engine"):
        measured(monkeypatch, disturbed, lambda *_: {})


def test_a_program_that_did_not_run_has_no_best() -> None:
    contest = StreamContest(
        batch=1,
        rates={"engine": Rates((3.0,), (1.0,))},
        at_once={"engine": 1},
        ways={"a": ("a, 1 stream",)},
        reasons={"a, 1 stream": "gone"},
        differences={},
    )
    assert contest.best() == {}
    assert contest.to_dict()["engine_times_as_fast"] == {}
