import pytest
import torch
from torch import nn
from torch.nn import functional as F

from biper_engine.nn import (
    BinaryConv2d,
    BinaryLinear,
    BinaryWeightConv2d,
    binary_layers,
    regularizer,
    set_tau,
)


def quantized(weight, stage, frequency=20.0):
    wave = torch.sin(frequency * weight)
    return wave if stage == 1 else wave.sign()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_conv_is_its_equation_in_both_modes(stage, bias):
    torch.manual_seed(0)
    conv = BinaryConv2d(4, 6, (3, 2), 2, 1, groups=2, bias=bias, stage=stage)
    x = torch.randn(2, 4, 7, 9)
    convolved = F.conv2d(x.sign(), quantized(conv.weight, stage), conv.bias, 2, 1, groups=2)
    assert torch.equal(conv.eval()(x), convolved * conv.alpha)
    assert torch.equal(conv.train()(x), convolved * conv.alpha)


def test_equal_integers_stay_equal_in_training_and_a_max_pool_takes_the_first():
    torch.manual_seed(0)
    conv = BinaryConv2d(8, 6, 3, padding=1)
    x = torch.randn(4, 8, 8, 8)
    integers = F.conv2d(x.sign(), quantized(conv.weight, 2), padding=1) * conv.alpha.sign()
    _, wanted = F.max_pool2d(integers, 2, return_indices=True)
    _, taken = F.max_pool2d(conv(x), 2, return_indices=True)
    assert torch.equal(taken, wanted)


@pytest.mark.parametrize("stage", [1, 2])
def test_linear_is_its_equation_in_both_modes(stage):
    torch.manual_seed(0)
    linear = BinaryLinear(9, 5, bias=True, stage=stage)
    x = torch.randn(2, 3, 9)
    expected = F.linear(x.sign(), quantized(linear.weight, stage), linear.bias) * linear.alpha
    assert torch.equal(linear.eval()(x), expected)
    assert torch.equal(linear.train()(x), expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_layer_of_binary_weights_alone_is_its_equation_in_both_modes(stage):
    torch.manual_seed(0)
    conv = BinaryWeightConv2d(4, 6, 3, stride=2, padding=1, stage=stage)
    x = torch.randn(2, 4, 7, 7)
    weight = quantized(conv.weight, stage)
    expected = F.conv2d(x, weight, None, stride=2, padding=1) * conv.alpha
    assert torch.equal(conv.eval()(x), expected)
    assert torch.equal(conv.train()(x), expected)
    assert list(binary_layers(conv)) == [("", conv)]


@pytest.mark.parametrize("beta", [False, True])
def test_state_dict_has_the_official_names_and_shapes(beta):
    conv, linear = BinaryConv2d(4, 6, 3, beta=beta), BinaryLinear(4, 6)
    shapes = [(name, tuple(value.shape)) for name, value in conv.state_dict().items()]
    unused = [("beta", (6, 1, 1))] if beta else []
    assert shapes == [("weight", (6, 4, 3, 3)), ("alpha", (6, 1, 1)), *unused, ("tau", ())]
    assert list(linear.state_dict()) == ["weight", "alpha", "tau"]
    assert linear.alpha.shape == (6,)


def test_beta_takes_no_part():
    conv = BinaryConv2d(4, 6, 3, beta=True)
    conv(torch.randn(2, 4, 5, 5)).sum().backward()
    assert not conv.beta.requires_grad
    assert conv.beta.grad is None


def test_regularizer_sums_each_layers_mean_times_its_tau():
    network = nn.Sequential(BinaryConv2d(2, 3, 3, frequency=7.0), nn.ReLU(), BinaryLinear(4, 5))
    set_tau(network, 0.5)
    network[2].tau.fill_(0.25)
    expected = 0.5 * torch.sin(7.0 * network[0].weight).square().mean()
    expected = expected + 0.25 * torch.sin(20.0 * network[2].weight).square().mean()
    torch.testing.assert_close(regularizer(network), expected)
    regularizer(network).backward()
    assert network[0].weight.grad is not None
    assert [name for name, _ in binary_layers(network)] == ["0", "2"]


def test_regularizer_without_binary_layers_is_zero():
    assert regularizer(nn.Linear(2, 2)).item() == 0


def test_stage_can_be_changed():
    conv = BinaryConv2d(4, 6, 3, stage=1).eval()
    conv.stage = 2
    assert set(conv.quantized_weight().unique().tolist()) == {-1.0, 1.0}
    assert "frequency=20.0, stage=2" in repr(conv)


@pytest.mark.parametrize("stage", [0, 3, None])
def test_unknown_stage_is_refused(stage):
    with pytest.raises(ValueError, match="must be 1 or 2"):
        BinaryConv2d(4, 6, 3, stage=stage)


@pytest.mark.parametrize("frequency", [0.0, -1.0, float("nan"), float("inf")])
def test_frequency_that_is_not_positive_is_refused(frequency):
    with pytest.raises(ValueError, match="positive number"):
        BinaryLinear(4, 6, frequency=frequency)
