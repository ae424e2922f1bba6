"""The convolution that has alpha in it: exactly the product, and the product's gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from biper_engine.models import build
from biper_engine.nn import BinaryConv2d, layers, regularizer, scaled_convolution
from biper_engine.nn.scaled_convolution import scaled_conv2d
from biper_engine.ops.cpu_module import native

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
@pytest.mark.parametrize("channels", [4, 32], ids=["in float", "on bits"])
def test_a_compiled_layer_has_the_gradients_of_a_plain_one(stage: int, channels: int) -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(channels, 6, 3, padding=1, stage=stage).train()
    inputs = torch.randn(2, channels, 7, 7).contiguous(memory_format=torch.channels_last)
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
        # Sums in another order, of values up to the largest.
        largest = plain.abs().max().item()
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5 * largest)


def layer_results(layer: BinaryConv2d, x: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, layer.weight.grad, layer.alpha.grad]


@pytest.mark.parametrize("surrogate", ["bireal", "clip", "identity"])
@pytest.mark.parametrize("zero", [False, True], ids=["signs", "a zero"])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 0}, {"groups": 2}], ids=str)
def test_a_training_step_on_bits_has_the_bytes_of_one_in_float(
    options: dict[str, Any], zero: bool, surrogate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = BinaryConv2d(32, 24, 3, **{"padding": 1, **options}).train()
    layer.activation_surrogate = surrogate
    x = torch.randn(3, 32, 9, 11).contiguous(memory_format=torch.channels_last)
    if zero:
        x[1, 2, 3, 4] = 0.0
    calls: list[Tensor] = []
    on_bits = scaled_convolution.signed_conv2d
    monkeypatch.setattr(
        scaled_convolution, "signed_conv2d", lambda *a, **k: calls.append(a[0]) or on_bits(*a, **k)
    )
    got = layer_results(layer, x)
    monkeypatch.setattr(layers, "bits_pay", lambda *operands: False)
    in_float = layer_results(layer, x)
    monkeypatch.setattr(BinaryConv2d, "_can_fuse", lambda self, x: False)
    plain = layer_results(layer, x)
    assert len(calls) == (native() is not None)
    for mine, other, product in zip(got, in_float, plain, strict=True):
        assert mine is not None
        assert other is not None
        assert product is not None
        assert torch.equal(mine, other)
        assert mine.stride() == other.stride()
        torch.testing.assert_close(mine, product, rtol=1e-5, atol=1e-5 * product.abs().max().item())


class HalfWeights(BinaryConv2d):
    def quantized_weight(self) -> Tensor:
        return super().quantized_weight() * 0.5


def layer_where(changes: str) -> tuple[BinaryConv2d, Tensor]:
    """Return a layer and an input of which something keeps the convolution from running on bits."""
    torch.manual_seed(0)
    kind = HalfWeights if changes == "other weights" else BinaryConv2d
    mode = {"padding_mode": "circular"} if changes == "circular" else {}
    layer = kind(32, 24, 3, padding=1, bias=changes == "bias", **mode).train()
    x = torch.randn(2, 32, 5, 6).contiguous(memory_format=torch.channels_last)
    if changes == "eval":
        layer.eval()
    if changes == "stage 1":
        layer.stage = 1
    if changes == "bfloat16":
        layer, x = layer.bfloat16(), x.bfloat16()
    if changes == "one alpha":
        layer.alpha = torch.nn.Parameter(torch.full((1, 1, 1), 0.5))
    if changes == "padding of one number":
        layer.padding = (1,)
    if changes == "contiguous":
        x = x.contiguous()
    return layer, x.requires_grad_(changes != "an input without a gradient")


@pytest.mark.parametrize(
    "changes",
    [
        *("eval", "stage 1", "bias", "bfloat16", "autocast", "circular", "other weights"),
        *("one alpha", "padding of one number", "contiguous", "an input without a gradient"),
    ],
)
def test_where_bits_do_not_give_the_same_floats_run(
    changes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*operands: Any, **options: Any) -> Tensor:
        raise AssertionError("on bits")

    layer, x = layer_where(changes)
    monkeypatch.setattr(layers, "scaled_sign_conv2d", refuse)
    with torch.autocast("cpu", torch.bfloat16, enabled=changes == "autocast"):
        assert layer(x).isfinite().all()
    if native() is not None:
        layer, x = layer_where("nothing")
        with pytest.raises(AssertionError, match="on bits"):
            layer(x)


@pytest.mark.parametrize("place", ["alpha", "weight"])
def test_an_operand_with_gaps_in_memory_is_read_right(place: str) -> None:
    layer, x = layer_where("nothing")
    wanted = layer_results(layer, x.detach())
    held = getattr(layer, place)
    wide = torch.zeros(*held.shape[:-1], 2 * held.shape[-1])
    wide[..., ::2] = held.detach()
    setattr(layer, place, torch.nn.Parameter(wide[..., ::2]))
    for mine, other in zip(layer_results(layer, x.detach()), wanted, strict=True):
        assert mine is not None
        assert other is not None
        assert torch.equal(mine, other)
    layer.alpha = torch.nn.Parameter(torch.tensor(0.5).expand(24, 1, 1), requires_grad=False)
    bits = layer._conv_forward(x.sign(), layer.quantized_weight(), None)
    assert torch.equal(layer(x), bits * 0.5)


def test_errors_are_those_of_the_float_convolution() -> None:
    layer, x = layer_where("nothing")
    with pytest.raises(RuntimeError, match="channels"):
        layer(x[:, :16].clone(memory_format=torch.channels_last))
    layer.padding = (0, 0)
    with pytest.raises(RuntimeError, match="Kernel size"):
        layer(x[:, :, :2])
    layer.padding = (-1, -1)
    with pytest.raises(RuntimeError, match="negative padding"):
        layer(x)


def test_an_input_without_a_gradient_may_change_after_the_call() -> None:
    layer, _ = layer_where("nothing")
    x = torch.randn(2, 32, 5, 6).contiguous(memory_format=torch.channels_last)
    out = layer(x)
    x.zero_()
    out.sum().backward()
    assert layer.alpha.grad is not None
    assert layer.alpha.grad.ne(0).all()


@pytest.mark.parametrize("through", ["alpha", "weight"])
def test_second_derivatives_are_those_in_float(
    through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def penalised() -> list[Tensor]:
        layer, x = layer_where("nothing")
        loss = layer(x).mean()  # its own gradient needs none
        (first,) = torch.autograd.grad(loss, getattr(layer, through), create_graph=True)
        (loss + 100 * first.square().sum()).backward()
        assert layer.alpha.grad is not None
        assert layer.weight.grad is not None
        return [layer.alpha.grad, layer.weight.grad]

    got = penalised()
    monkeypatch.setattr(layers, "bits_pay", lambda *operands: False)
    for mine, wanted in zip(got, penalised(), strict=True):
        torch.testing.assert_close(mine, wanted)
        assert wanted.ne(0).any()


def test_a_second_derivative_through_the_sign_is_refused() -> None:
    layer, x = layer_where("nothing")
    loss = layer(x).square().mean()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.square().sum().backward()


def trained(steps: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = build("cifar10/resnet20_1w1a", stage=2).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(images), torch.arange(4)) + regularizer(network)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.state_dict()


@pytest.mark.usefixtures("one_thread")
def test_a_network_trained_on_bits_has_the_bytes_of_one_trained_in_float(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    got = trained(3)
    monkeypatch.setattr(layers, "bits_pay", lambda *operands: False)
    for name, wanted in trained(3).items():
        assert torch.equal(got[name], wanted), name
