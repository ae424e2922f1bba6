"""Waves in the place of BiPer's sine, and other surrogate gradients of the activations' sign."""

import math

import pytest
import torch
from torch import nn

from biper_engine import convert, verify
from biper_engine.nn import (
    BinaryConv2d,
    BinaryLinear,
    binarize_activation,
    binarize_weight,
    regularizer,
    set_binarizers,
    set_tau,
)
from biper_engine.nn.binarizers import ACTIVATION_SURROGATES, WEIGHT_BINARIZERS

FREQUENCY = 20.0
WEIGHTS = torch.linspace(-1.3, 1.3, 4001, dtype=torch.float64)
T = FREQUENCY * WEIGHTS

VALUES = {
    "periodic": torch.sin(T),
    "sawtooth": (T / math.pi + 1).remainder(2) - 1,
    "triangle": 2 / math.pi * torch.asin(torch.sin(T)),
    "sign": WEIGHTS.clamp(-1, 1),
}
SLOPES = {
    "periodic": FREQUENCY * torch.cos(T),
    "sawtooth": torch.full_like(T, FREQUENCY / math.pi),
    "triangle": 2 * FREQUENCY / math.pi * torch.cos(T).sign(),
    "sign": (WEIGHTS.abs() <= 1).double(),
}


@pytest.mark.parametrize("name", WEIGHT_BINARIZERS)
@pytest.mark.parametrize("stage", [1, 2])
def test_weights_and_their_gradient_are_those_of_the_wave(name, stage):
    weight = WEIGHTS.clone().requires_grad_()
    made = binarize_weight(weight, frequency=FREQUENCY, stage=stage, binarizer=name)
    made.sum().backward()
    torch.testing.assert_close(made, VALUES[name] if stage == 1 else VALUES[name].sign())
    torch.testing.assert_close(weight.grad, SLOPES[name])


@pytest.mark.parametrize("name", ["sawtooth", "triangle"])
def test_binary_weights_are_those_of_the_sine(name):
    made = binarize_weight(WEIGHTS, frequency=FREQUENCY, stage=2, binarizer=name)
    assert torch.equal(made, torch.sin(T).sign())


@pytest.mark.parametrize("dims", [(), (-1,)])
@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("bireal", lambda u: (2 - (2 * u).abs()).clamp(min=0)),
        ("clip", lambda u: (u.abs() <= 1).to(u.dtype)),
        ("identity", torch.ones_like),
    ],
)
def test_activations_have_the_gradient_of_their_surrogate(name, window, dims):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 9, dtype=torch.float64, generator=generator).requires_grad_()
    upstream = torch.randn(4, 9, dtype=torch.float64, generator=generator)
    signs = binarize_activation(x, scale_dims=dims, surrogate=name)
    (found,) = torch.autograd.grad(signs, x, upstream)
    assert torch.equal(signs, x.sign())
    u = x / torch.sqrt(x.var(dims, keepdim=True) + 1e-5) if dims else x * 1
    (wanted,) = torch.autograd.grad(u, x, upstream * window(u).detach())
    torch.testing.assert_close(found, wanted)


def network(name, surrogate="bireal"):
    torch.manual_seed(0)
    layers = nn.Sequential(
        BinaryConv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.Hardtanh(),
        BinaryConv2d(32, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        BinaryLinear(32, 4),
    )
    set_binarizers(layers, weight=name, activation=surrogate)
    return layers


@pytest.mark.some(2)
@pytest.mark.parametrize("name", WEIGHT_BINARIZERS)
def test_a_trained_step_converts_and_verifies(name):
    layers = network(name, "clip")
    images = torch.randn(4, 3, 6, 6)
    layers(images).square().mean().backward()
    assert all(parameter.grad is not None for parameter in layers.parameters())
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter -= 0.01 * parameter.grad
    layers.eval()
    engine = convert(layers, images, check=False)
    check = verify(engine, layers, images)
    assert check.ok, str(check)
    assert engine.report.packed == 3


def test_the_regulariser_is_the_mean_square_of_the_wave():
    for name in WEIGHT_BINARIZERS:
        layers = network(name)
        set_tau(layers, 0.5)
        wanted = sum(
            0.5 * binarize_weight(w, frequency=FREQUENCY, stage=1, binarizer=name).square().mean()
            for w in (layers[0].weight, layers[3].weight, layers[7].weight)
        )
        torch.testing.assert_close(regularizer(layers), wanted)


def test_what_differs_from_biper_is_in_the_description():
    assert "weight_binarizer=sawtooth" in repr(network("sawtooth"))
    assert "binarizer" not in repr(network("periodic"))
    assert "activation_surrogate=identity" in repr(network("periodic", "identity"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "sawtoth"}, "Unknown weight binarizer 'sawtoth'. Did you mean 'sawtooth'"),
        ({"activation": "relu"}, f"Known: {', '.join(ACTIVATION_SURROGATES)}"),
    ],
)
def test_unknown_names_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        set_binarizers(network("sign"), **options)
