import math

import pytest
import torch

from biper_engine.nn import binarize_activation, binarize_weight


def naive_scaled_sign_gradient(x, upstream, dims):
    """The definition, by autograd through the variance and the integral of the window."""
    x = x.detach().requires_grad_()
    u = x / torch.sqrt(x.var(dims, keepdim=True) + 1e-5)
    # d/du (2u - u|u|) = 2 - 2|u| inside |u| < 1; constant outside.
    inside = u.clamp(-1, 1)
    (2 * inside - inside * inside.abs()).backward(upstream)
    return x.grad


@pytest.mark.parametrize(
    ("shape", "dims"), [((3, 5, 4, 7), (-3, -2, -1)), ((5, 4, 7), (-3, -2, -1)), ((6, 9), (-1,))]
)
def test_scaled_sign_has_the_gradient_of_its_definition(shape, dims):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator) * 0.7 + 0.2
    upstream = torch.randn(shape, dtype=torch.float64, generator=generator)
    leaf = x.clone().requires_grad_()
    binarize_activation(leaf, scale_dims=dims).backward(upstream)
    torch.testing.assert_close(leaf.grad, naive_scaled_sign_gradient(x, upstream, dims))


def test_unscaled_sign_has_the_bi_real_gradient():
    x = torch.tensor([-2.0, -1.0, -0.25, 0.0, 0.5, 1.5], requires_grad=True)
    y = binarize_activation(x)
    y.sum().backward()
    assert y.tolist() == [-1, -1, -1, 0, 1, 1]
    assert x.grad.tolist() == [0, 0, 1.5, 2, 1, 0]


def test_scaling_does_not_change_the_sign():
    x = torch.tensor([[1e-30, -0.0, 0.0, -3.0, math.inf]])
    signs = binarize_activation(x, scale_dims=(-1,))
    torch.testing.assert_close(signs, torch.tensor([[1.0, 0.0, 0.0, -1.0, 1.0]]))


@pytest.mark.parametrize("stage", [1, 2])
def test_weight_gradient_is_that_of_the_sine_in_both_stages(stage):
    weight = torch.linspace(-0.3, 0.3, 41, dtype=torch.float64, requires_grad=True)
    binarize_weight(weight, frequency=20.0, stage=stage).sum().backward()
    torch.testing.assert_close(weight.grad, 20 * torch.cos(20 * weight.detach()))


def test_stage_2_weights_are_a_square_wave():
    weight = torch.tensor([0.0, 0.1, 0.2, -0.1, -0.2])
    wave = binarize_weight(weight, frequency=20.0, stage=2)
    assert wave.tolist() == [0, 1, -1, -1, 1]
    assert torch.equal(binarize_weight(weight, frequency=20.0, stage=1), torch.sin(20.0 * weight))
