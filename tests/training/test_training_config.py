import json

import pytest

from biper_engine.training import AugmentConfig, OptimizerConfig, StageConfig, TrainingConfig


def test_config_survives_json():
    config = TrainingConfig(
        seed=3,
        augment=AugmentConfig(crop_area=(0.1, 1), flip=True),
        optimizer=OptimizerConfig(name="adam"),
        stage2=StageConfig(epochs=4, lr=0.1, weight_decay=0.0, tau=0.5),
    )
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("key", "value"), [("epochs", 0), ("lr", 0.0), ("weight_decay", -1.0), ("tau", -0.1)]
)
def test_stage_settings_out_of_range_are_refused(key, value):
    settings = {"epochs": 1, "lr": 0.1, "weight_decay": 0.0, "tau": 0.0, key: value}
    with pytest.raises(ValueError, match=f"`{key}`"):
        StageConfig(**settings)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 1),
        ("accumulate", 0),
        ("steps_per_epoch", 0),
        ("num_classes", 0),
        ("seed", -1),
        ("test_share", 1.0),
        ("corrupt", "ignore"),
    ],
)
def test_run_settings_out_of_range_are_refused(key, value):
    with pytest.raises(ValueError, match=f"`{key}`"):
        TrainingConfig(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_zoom", 1.0),
        ("brightness", -0.1),
        ("pad_px", -1),
        ("pad_px", 1_000_000),
        ("crop_area", (0.5, 1.5)),
        ("crop_area", (0.5,)),
        ("crop_ratio", (2, 1)),
    ],
)
def test_augmentation_out_of_range_is_refused(key, value):
    with pytest.raises(ValueError, match=f"`{key}`"):
        AugmentConfig(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"), [("name", "sdg"), ("decay", "none"), ("schedule", "cos"), ("momentum", 1.0)]
)
def test_optimizers_that_are_not_there_are_refused(key, value):
    with pytest.raises(ValueError, match=f"`{key}`"):
        OptimizerConfig(**{key: value})
