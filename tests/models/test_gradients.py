"""Every parameter's gradient in training, compared with the equations in float64.

At each step the equations start from the network's own state, so that errors do not accumulate.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from biper_engine.models import Network, build
from biper_engine.nn import regularizer, set_tau
from tests.golden import weights
from tests.golden.networks import BIPER
from tests.models.equations import Equations, loss

STEPS = 20
TAU = 0.04
# Batch and image size: the smallest that the network's last pool and BatchNorm1d take.
SHAPES = {
    "cifar10/resnet20_1w1a": (6, 8),
    "cifar10/resnet20_1w32a": (6, 8),
    "imagenet/mobilenet_1w1a": (4, 64),
    "imagenet/resnet18_1w1a": (3, 193),
    "imagenet/resnet34_1w1a": (3, 193),
}
USUAL = (4, 32)
# Networks whose two steps take a second; the weekly test has all steps. From the second one on,
# alpha has the whole of float64's digits, as any trained one has of its type's.
QUICK = ("cifar10/resnet20_1w1a", "cifar10/resnet20_1w32a")
DEEP = ("cifar10/vgg_small_1w1a", "imagenet/resnet18_1w1a")
CASES = [
    pytest.param(n, marks=[pytest.mark.deep if n in DEEP else pytest.mark.weekly])
    if n not in QUICK
    else n
    for n in BIPER
    if "34" not in n
]


pytestmark = pytest.mark.usefixtures("one_thread")


def wanted_gradients(
    network: Network, name: str, stage: int, images: Tensor, labels: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of the equations at the network's present state."""
    state = {key: value.detach().clone() for key, value in network.state_dict().items()}
    parameters = {
        key: state[key].requires_grad_()
        for key, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    net = Equations(state, frequency=20.0, stage=stage)
    total = loss(net.logits(name, images), labels) + net.regularizer(TAU)
    gradients = torch.autograd.grad(total, list(parameters.values()))
    return total.item(), dict(zip(parameters, gradients, strict=True))


def check(name: str, stage: int, steps: int) -> None:
    torch.manual_seed(stage)
    network = build(name, num_classes=10, frequency=20.0, stage=stage).double().train()
    network.load_state_dict(weights.tensors(network))
    set_tau(network, TAU)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    batch, size = SHAPES.get(name, USUAL)
    for _ in range(steps):
        images = torch.randn(batch, 3, size, size, dtype=torch.float64)
        labels = torch.randint(10, (batch,))
        value, gradients = wanted_gradients(network, name, stage, images, labels)
        total = F.cross_entropy(network(images), labels) + regularizer(network)
        optimizer.zero_grad()
        total.backward()
        assert total.item() == pytest.approx(value, rel=1e-12)
        compare(network, gradients)
        # The deep networks' first gradients are large, and would lead nowhere.
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


def compare(network: Network, gradients: dict[str, Tensor]) -> None:
    """Hold every gradient against the wanted one, by norms.

    Roundings differ by 3e-14 in most, and add up to 1e-12 in the deepest network. BatchNorm takes
    the scale of its input away, so that alpha's gradient is the small rest of a sum that cancels:
    its terms are of the size of the weight's.
    """
    parameters = dict(network.named_parameters())
    for key, wanted in gradients.items():
        got = parameters[key].grad
        assert got is not None, key
        bound = 1e-10 * wanted.norm()
        if key.endswith(".alpha"):
            terms = gradients[key.replace(".alpha", ".weight")].norm()
            bound = 1e-8 * wanted.norm() + 1e-12 * terms
        assert (got - wanted).norm() <= bound, key


@pytest.mark.some(3)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_equations(name: str, stage: int) -> None:
    check(name, stage, 2)


@pytest.mark.weekly
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", BIPER)
def test_gradients_are_those_of_the_equations_for_twenty_steps(name: str, stage: int) -> None:
    check(name, stage, STEPS)
