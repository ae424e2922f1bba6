"""Names and settings of a sweep's runs."""

from __future__ import annotations

import pytest

from biper_engine.training import TrainingConfig, sweep_configs


def test_there_is_a_run_for_each_value() -> None:
    runs = sweep_configs(TrainingConfig(seed=3), ["frequency=5,10, 2e1,.5"])
    assert list(runs) == ["frequency=5", "frequency=10", "frequency=2e1", "frequency=0.5"]
    assert [run.frequency for run in runs.values()] == [5, 10, 20, 0.5]
    assert {run.seed for run in runs.values()} == {3}


def test_several_settings_are_combined() -> None:
    runs = sweep_configs(TrainingConfig(), ["weight_binarizer=periodic,sign", "seed=0,1"])
    assert list(runs) == [
        *("weight_binarizer=periodic,seed=0", "weight_binarizer=periodic,seed=1"),
        *("weight_binarizer=sign,seed=0", "weight_binarizer=sign,seed=1"),
    ]
    assert runs["weight_binarizer=sign,seed=1"].weight_binarizer == "sign"


def test_groups_short_keys_lists_and_nothing_are_values() -> None:
    runs = sweep_configs(
        TrainingConfig(), ["optimizer.lr=0.1,0.05", "augment.crop_area=[0.5,1],null"]
    )
    assert list(runs)[:2] == [
        "optimizer.lr=0.1,augment.crop_area=0.5-1",
        "optimizer.lr=0.1,augment.crop_area=None",
    ]
    last = list(runs.values())[-1]
    assert (last.stage1.lr, last.stage2.lr, last.augment.crop_area) == (0.05, 0.05, None)
    assert next(iter(runs.values())).augment.crop_area == (0.5, 1.0)


def test_a_name_is_no_path() -> None:
    (name,) = sweep_configs(TrainingConfig(), ["dataset=../a b/c"])
    assert name == "dataset=..-a-b-c"


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["frequenzy=1,2"], "unknown key 'frequenzy'. Did you mean 'frequency'"),
        (["freq=1,2"], "Did you mean 'frequency'"),
        (["stage1.lrr=1"], r"Did you mean 'stage1\.lr'"),
        (["frequency"], "wanted key=value,value"),
        (["frequency="], "wanted key=value,value"),
        (["frequency=5,x"], "'frequency' is 'x', wanted a number"),
        (["frequency=20,2e1"], "has frequency=2e1 twice"),
        (["frequency=5,5.0"], "has frequency=5 twice"),
        (["seed=1,2", "seed=3"], "has 'seed' twice"),
        (["seed=1,-2"], "`seed` .=-2. must be 0 or more"),
        (["augment.crop_area=[0.5,1"], "is not YAML"),
    ],
)
def test_mistakes(axes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep_configs(TrainingConfig(), axes)
