import json

import pytest
import torch
from torch import Tensor

from biper_engine.ops.backends import use_backend
from tests.networks_by_hand import classifier


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_every_operator_has_a_row_in_order(images: Tensor) -> None:
    with use_backend("reference"):
        report = classifier().profile(images, rounds=2)
    assert (report.batch, report.rounds, report.threads) == (2, 2, torch.get_num_threads())
    assert [(node.name, node.op, node.backend) for node in report.nodes][:4] == [
        ("stem", "aten.conv2d", "torch"),
        ("stem_bits", "binarize", "reference"),
        ("layer1_0", "bconv2d_float_bits", "reference"),
        ("layer1_1", "bconv2d_bits", "reference"),
    ]
    assert all(node.ms > 0 for node in report.nodes)
    assert report.total_ms == sum(node.ms for node in report.nodes)
    assert json.loads(json.dumps(report.to_dict()))["nodes"][0]["name"] == "stem"


def test_multiply_accumulates_are_those_of_the_batch(images: Tensor) -> None:
    macs = {node.name: node.macs for node in classifier().profile(images, rounds=1).nodes}
    assert macs["layer1_0"] == 2 * 8 * 8 * 33 * 33 * 9
    assert macs["layer2_0"] == 2 * 4 * 4 * 33 * 40 * 9
    assert macs["stem"] is macs["pool"] is None


def test_the_table_gives_shares_of_the_time_and_of_a_peak(images: Tensor) -> None:
    report = classifier().profile(images, rounds=1)
    (row,) = [node for node in report.nodes if node.name == "layer1_0"]
    assert row.macs_per_second is not None
    lines = report.table(2 * row.macs_per_second).splitlines()
    assert max(map(len, lines)) <= 80
    (line,) = [line for line in lines if line.startswith("layer1_0")]
    assert line.split()[-1] == "50%"
    assert f"{row.ms / report.total_ms:.1%}" in line
    assert "peak" not in str(report)


def test_the_input_is_checked_as_in_a_call(images: Tensor) -> None:
    with pytest.raises(ValueError, match="converted for images of 3x8x8"):
        classifier().profile(images[..., :7])
    with pytest.raises(ValueError, match=r"`rounds` \(=0\) must be 1 or more"):
        classifier().profile(images, rounds=0)
