"""The official code's numbers, in float64; see tests/golden/README.md."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from biper_engine.models import build
from biper_engine.nn import regularizer, set_tau
from tests.golden import weights


@pytest.fixture(autouse=True)
def one_thread():
    """PyTorch's float64 convolutions on eight images gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network_of(case, stage):
    network = build("cifar10/resnet20_1w1a", frequency=case["freq"], stage=stage).double()
    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    assert shapes == case["shapes"]
    assert list(shapes) == list(case["shapes"])
    arrays = weights.state(case["shapes"])
    network.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})
    return network


@pytest.mark.parametrize("stage", [1, 2])
def test_logits_are_the_official_ones(stage):
    name = "cifar10/resnet20_1w1a"
    case = weights.read("inference")[f"{name}/stage{stage}"]
    with torch.no_grad():
        images = torch.from_numpy(weights.images(name, 4, 32)).double()
        logits = network_of(case, stage).eval()(images)
    expected = torch.tensor(case["logits"], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stage", [1, 2])
def test_three_training_steps_are_the_official_ones(stage):
    case = weights.read("training")[f"resnet20_1w1a/stage{stage}"]
    network = network_of(case, stage).train()
    set_tau(network, case["tau"])
    settings = {key: case[key] for key in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD(network.parameters(), **settings)
    for step, (cross_entropy, penalty) in enumerate(case["losses"]):
        images = torch.from_numpy(weights.images(f"train/resnet20_1w1a/{step}", 8, 32)).double()
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
