import json
from typing import Any

import pytest

from biper_engine.metadata import Metadata, Provenance


def test_metadata_survives_json() -> None:
    metadata = Metadata(
        input_size=(3, 32, 48),
        interpolation="bicubic",
        crop_pct=0.875,
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.25, 1e-3),
        class_names=("cat", "dög"),
    )
    again = Metadata.from_dict(json.loads(json.dumps(metadata.to_dict())))
    assert again == metadata
    assert hash(again) == hash(metadata)


def test_provenance_survives_json() -> None:
    provenance = Provenance(
        architecture="cifar10/resnet20_1w1a", frequency=20.1, stage=2, licence="MIT"
    )
    assert Provenance.from_dict(json.loads(json.dumps(provenance.to_dict()))) == provenance


@pytest.mark.parametrize("kind", [Metadata, Provenance])
def test_defaults_survive_json_and_unknown_keys_are_ignored(kind: type[Any]) -> None:
    values = json.loads(json.dumps(kind().to_dict()))
    assert kind.from_dict({**values, "from_a_later_version": [1]}) == kind()
    assert kind.from_dict({}) == kind()


def test_lists_become_tuples() -> None:
    metadata = Metadata(
        input_size=[1, 8, 8],  # type: ignore[arg-type]
        mean=[0.5],  # type: ignore[arg-type]
        std=[0.5],  # type: ignore[arg-type]
        class_names=["a", "b"],  # type: ignore[arg-type]
    )
    assert metadata.input_size == (1, 8, 8)
    assert metadata.mean == metadata.std == (0.5,)
    assert metadata.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interpolation": "lanczos"}, r"`interpolation` \(='lanczos'\) must be 'nearest'"),
        ({"crop_pct": 0.0}, r"`crop_pct` \(=0.0\) must be in \(0, 1\]"),
        ({"crop_pct": 1.5}, r"`crop_pct` \(=1.5\)"),
        ({"crop_pct": float("nan")}, r"`crop_pct` \(=nan\)"),
        ({"mean": (0.5,)}, r"`mean` \(=\(0.5,\)\) and `std` .* one entry per channel"),
        ({"std": (1.0, 0.0, 1.0)}, r"`std` .* every standard deviation above 0"),
        ({"std": (1.0, float("nan"), 1.0)}, r"every standard deviation above 0"),
    ],
)
def test_impossible_preprocessing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Metadata(**changes)
