"""Results of the official code, in float64; see tests/golden/README.md."""

import pytest
import torch
from torch.nn import functional as F

from biper_engine.models import build
from biper_engine.nn import regularizer, set_tau
from tests.golden import weights
from tests.golden.networks import LARGE_ARE_DEEP

pytestmark = pytest.mark.usefixtures("one_thread")


def network_of(name, stage):
    network = build(name, frequency=20.0, stage=stage).double()
    network.load_state_dict(weights.tensors(network))
    return network


@pytest.mark.some(3)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", LARGE_ARE_DEEP)
def test_names_shapes_and_logits_are_the_official_ones(name, stage):
    case = weights.read("inference")[name]
    network = network_of(name, stage).eval()
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert list(shapes.items()) == list(case["shapes"].items())
    count = 1 if name.startswith("imagenet/") else 4
    with torch.no_grad():
        images = torch.from_numpy(weights.images(name, 4, network.input_shape[1]))[:count]
        logits = network(images.double())[:, :: case["every"]]
    expected = torch.tensor(case["logits"][f"stage{stage}"], dtype=torch.float64)[:count]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.some(1)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "name", ["resnet20_1w1a", pytest.param("vgg_small_1w1a", marks=pytest.mark.weekly)]
)
def test_three_training_steps_are_the_official_ones(name, stage):
    case = weights.read("training")[f"{name}/stage{stage}"]
    network = network_of(f"cifar10/{name}", stage).train()
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == case[
        "shapes"
    ]
    set_tau(network, case["tau"])
    settings = {key: case[key] for key in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD(network.parameters(), **settings)
    for step, (cross_entropy, penalty) in enumerate(case["losses"]):
        images = torch.from_numpy(weights.images(f"train/{name}/{step}", 8, 32)).double()
        loss = F.cross_entropy(network(images), torch.arange(8) % 10)
        decay = regularizer(network)
        assert loss.item() == pytest.approx(cross_entropy, rel=1e-9)
        assert decay.item() == pytest.approx(penalty, rel=1e-9)
        optimizer.zero_grad()
        (loss + decay).backward()
        if step == 0:
            norms = {
                name: parameter.grad.norm().item()
                for name, parameter in network.named_parameters()
                if parameter.grad is not None
            }
            assert norms == pytest.approx(case["grad_norms"], rel=1e-8)
        optimizer.step()
