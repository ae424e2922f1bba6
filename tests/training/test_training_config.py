import json

import pytest

from biper_engine.training import StageConfig, TrainingConfig


def test_config_survives_json():
    config = TrainingConfig(seed=3, stage2=StageConfig(epochs=4, lr=0.1, weight_decay=0.0, tau=0.5))
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("key", "value"), [("epochs", 0), ("lr", 0.0), ("weight_decay", -1.0), ("tau", -0.1)]
)
def test_stage_settings_out_of_range_are_refused(key, value):
    settings = {"epochs": 1, "lr": 0.1, "weight_decay": 0.0, "tau": 0.0, key: value}
    with pytest.raises(ValueError, match=f"`{key}`"):
        StageConfig(**settings)


@pytest.mark.parametrize(("key", "value"), [("batch_size", 1), ("max_zoom", 1.0)])
def test_run_settings_out_of_range_are_refused(key, value):
    with pytest.raises(ValueError, match=f"`{key}`"):
        TrainingConfig(**{key: value})
