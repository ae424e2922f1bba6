"""The convolution that has alpha in it: exactly the product, and the product's gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from biper_engine.nn import BinaryConv2d
from biper_engine.nn.scaled_convolution import scaled_conv2d

GEOMETRIES: list[dict[str, Any]] = [
    {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "groups": 2},
]


def operands(groups: int, bias: bool, dtype: torch.dtype) -> list[Tensor | None]:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 8, 9, dtype=dtype)
    weight = torch.randn(6, 4 // groups, 3, 3, dtype=dtype)
    alpha = torch.tensor([1.5, 0.0, -2.0, 1e-3, 0.5, 1.0], dtype=dtype).view(6, 1, 1)
    added = torch.randn(6, dtype=dtype) if bias else None
    return [x.sign(), weight.sign(), added, alpha]


def gradients(run: Any, values: list[Tensor | None], geometry: dict[str, Any]) -> list[Tensor]:
    leaves = [None if v is None else v.clone().requires_grad_() for v in values]
    out = run(*leaves, **geometry)
    torch.manual_seed(1)
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(out, wanted, torch.randn_like(out))
    return [out.detach(), *grads]


def product(x: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor, **g: Any) -> Tensor:
    return F.conv2d(x, weight, bias, **g) * alpha


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["plain", "grouped"])
def test_it_is_the_product_and_has_its_gradients(
    geometry: dict[str, Any], bias: bool, dtype: torch.dtype
) -> None:
    values = operands(geometry["groups"], bias, dtype)
    got = gradients(scaled_conv2d, values, geometry)
    wanted = gradients(product, values, geometry)
    assert torch.equal(got[0], wanted[0])
    for mine, other in zip(got[1:], wanted[1:], strict=True):
        assert mine.shape == other.shape
        # Sums of up to 216 products in another order.
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=200 * torch.finfo(dtype).eps)


def test_gradients_that_nobody_wants_are_left_out() -> None:
    x, weight, _, alpha = operands(1, False, torch.float32)
    assert x is not None
    assert weight is not None
    assert alpha is not None
    for wanted in (x, weight, alpha):
        leaves = [value.clone().requires_grad_(value is wanted) for value in (x, weight, alpha)]
        scaled_conv2d(leaves[0], leaves[1], None, leaves[2], **GEOMETRIES[0]).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [leaf.requires_grad for leaf in leaves]


def test_the_gradient_has_a_gradient() -> None:
    x, weight, _, alpha = operands(1, False, torch.float64)
    inputs = tuple(
        t[..., :4, :4].clone().requires_grad_() for t in (x, weight, alpha) if t is not None
    )

    def run(x: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
        return scaled_conv2d(x[:1], weight, None, alpha, **GEOMETRIES[0])

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize(
    "options",
    [{"padding": 1}, {"padding": "same"}, {"padding": 1, "padding_mode": "circular"}],
    ids=str,
)
def test_layers_give_the_product_in_training_whatever_their_padding(
    options: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(4, 6, 3, bias=True, **options)
    x = torch.randn(2, 4, 7, 7)
    wanted = layer._conv_forward(x.sign(), layer.quantized_weight(), layer.bias) * layer.alpha
    assert torch.equal(layer.train()(x), wanted)
    assert torch.allclose(layer.train()(x[0]), wanted[0])


def test_autocast_keeps_its_types() -> None:
    layer = BinaryConv2d(4, 6, 3, padding=1).train()
    x = torch.randn(2, 4, 7, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert layer.alpha.grad is not None


@pytest.mark.deep
@pytest.mark.parametrize("stage", [1, 2])
def test_a_compiled_layer_has_the_gradients_of_a_plain_one(stage: int) -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(4, 6, 3, padding=1, stage=stage).train()
    inputs = torch.randn(2, 4, 7, 7)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        x = inputs.clone().requires_grad_()
        layer.zero_grad()
        out = run(x)
        out.square().sum().backward()
        results.append([out, x.grad, layer.weight.grad, layer.alpha.grad])
    for plain, compiled in zip(*results, strict=True):
        assert plain is not None
        assert compiled is not None
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
