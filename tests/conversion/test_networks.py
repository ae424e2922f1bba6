"""The networks of this package, with the golden weights."""

import numpy as np
import pytest
import torch
from torch import nn

from biper_engine.conversion import convert, verify
from biper_engine.models import build
from tests.conversion.comparison import assert_close
from tests.golden import weights

PACKED = {
    "cifar10/resnet20_1w1a": 18,
    "cifar10/resnet18_1w1a": 16,
    "cifar10/vgg_small_1w1a": 5,
}


def golden(name: str) -> nn.Module:
    model = build(name, frequency=20, stage=2).eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    arrays = weights.state(shapes)
    model.load_state_dict({key: torch.from_numpy(np.array(a)) for key, a in arrays.items()})
    return model


@pytest.mark.parametrize("name", PACKED)
def test_every_binary_convolution_is_packed_and_the_logits_agree(name: str) -> None:
    model = golden(name)
    images = torch.from_numpy(weights.images(name, 4, 32))
    engine = convert(model, unconverted="raise", check=False)
    assert engine.report.packed == PACKED[name]
    assert engine.input_shape == (3, 32, 32)
    assert engine.provenance == model.provenance
    assert engine.metadata == model.metadata
    report = verify(engine, model, images)
    assert report.ok, report.table()
    assert report.layers_equal == report.layers == PACKED[name]
    assert_close(engine, model, images)


def test_a_fresh_network_and_a_zero_image() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("cifar10/resnet20_1w1a").eval()
    engine = convert(model, check=False)
    report = verify(engine, model, torch.zeros(1, 3, 32, 32))
    assert report.ok, report.table()
    assert report.exact_zeros > 0
