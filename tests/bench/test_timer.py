import pytest

from biper_engine.bench import timer
from biper_engine.bench.timer import Budget, Samples, interleave


def test_contestants_are_called_in_turn_as_often_as_each_other() -> None:
    calls: list[str] = []
    budget = Budget(seconds=0.0, fewest=3, most=10, warmup=1)
    taken = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, budget)
    assert calls == ["a", "b"] * 4
    assert {name: len(samples.ms) for name, samples in taken.items()} == {"a": 3, "b": 3}
    assert all(ms >= 0 for samples in taken.values() for ms in samples.ms)


def test_the_most_rounds_end_it() -> None:
    taken = interleave({"a": lambda: None}, Budget(seconds=60.0, fewest=1, most=4, warmup=0))
    assert len(taken["a"].ms) == 4


def test_a_turn_has_a_pause_and_calls_that_do_not_count_and_a_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[object] = []
    monkeypatch.setattr(timer, "sleep", done.append)
    budget = Budget(seconds=0.0, fewest=2, most=2, warmup=0, pause_ms=4.0, ahead=2)
    calls = {"a": lambda: done.append("a"), "b": lambda: done.append("b")}
    taken = interleave(calls, budget, {"a": 60.0, "b": 0.0})
    assert done == [4e-3, "a", "a", "a", 60e-3, 4e-3, "b", "b", "b"] * 2
    assert {len(samples.ms) for samples in taken.values()} == {2}


def test_median_and_quartiles() -> None:
    samples = Samples((5.0, 1.0, 3.0, 2.0, 4.0))
    assert samples.median_ms == 3.0
    assert samples.quartiles_ms == (2.0, 4.0)
    assert Samples((7.0,)).quartiles_ms == (7.0, 7.0)
    assert samples.to_dict() == {
        "median_ms": 3.0,
        "quartile_1_ms": 2.0,
        "quartile_3_ms": 4.0,
        "samples_ms": [5.0, 1.0, 3.0, 2.0, 4.0],
    }


@pytest.mark.parametrize(
    "wrong",
    [
        *({"seconds": -1.0}, {"fewest": 0}, {"fewest": 5, "most": 4}, {"warmup": -1}),
        *({"pause_ms": -1.0}, {"ahead": -1}),
    ],
)
def test_a_budget_out_of_range_is_an_error(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        Budget(**wrong)  # type: ignore[arg-type]
