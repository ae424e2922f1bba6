"""Networks of the registry with random weights that behave like trained ones."""

import torch

from biper_engine.cli.sources import random_network
from biper_engine.nn import binary_layers


def test_random_networks_have_mixed_weights_and_no_exact_zeros() -> None:
    network = random_network("cifar10/resnet20_1w1a")
    assert not network.training
    for _, layer in binary_layers(network):
        weight = layer.quantized_weight()
        assert 0.4 < float((weight > 0).float().mean()) < 0.6
        assert int((weight == 0).sum()) == 0


def test_batch_norms_are_not_fresh() -> None:
    norms = [
        module
        for module in random_network("cifar10/resnet20_1w1a").modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    ]
    assert norms
    for norm in norms:
        norm.requires_grad_(False)
        assert float(norm.bias.abs().min()) > 0.0
        assert 0.5 <= float(norm.running_var.min()) < float(norm.running_var.max()) <= 2.0
        assert 0.5 <= float(norm.weight.min()) < float(norm.weight.max()) <= 1.5
        assert float(norm.running_mean.std()) > 0.1


def test_random_networks_are_the_same_each_time_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = (random_network("cifar10/resnet20_1w1a", num_classes=7) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert first(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
