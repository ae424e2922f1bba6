"""PyTorch's layers with BiPer's periodic weights, and all but one with binary activations."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.nn.binarizers import (
    ACTIVATION_SURROGATES,
    WEIGHT_BINARIZERS,
    known_name,
    wave,
)
from biper_engine.nn.binary_layer import BinaryLayer, binary_layers
from biper_engine.nn.functional import binarize_activation, binarize_weight
from biper_engine.nn.scaled_convolution import scaled_conv2d, scaled_sign_conv2d
from biper_engine.ops.signed_convolution import bits_pay

__all__ = [
    "BinaryConv2d",
    "BinaryLinear",
    "BinaryWeightConv2d",
    "regularizer",
    "set_binarizers",
    "set_tau",
]


class _Periodic(BinaryLayer):
    """State that all layers share: frequency, alpha, tau. Mixed into nn.Module.

    Stage 1 has weights sin(frequency*w), stage 2 has weights sign(sin(frequency*w)).
    """

    alpha: nn.Parameter
    beta: nn.Parameter | None
    tau: Tensor
    frequency: float
    weight_binarizer: str = "periodic"
    activation_surrogate: str = "bireal"

    def quantized_weight(self) -> Tensor:
        """Return the weights that the forward pass multiplies with, before `alpha`."""
        return binarize_weight(
            self.weight,
            frequency=self.frequency,
            stage=self._stage,
            binarizer=self.weight_binarizer,
        )

    def weight_bits(self) -> Tensor:
        """Return which weights are positive in stage 2."""
        return wave(self.weight, self.frequency, self.weight_binarizer) >= 0

    def extra_repr(self) -> str:
        """Add frequency, stage and what differs from BiPer to PyTorch's description of a layer."""
        described: str = super().extra_repr()  # type: ignore[misc]
        others = [
            f", {name}={getattr(self, name)}"
            for name in ("weight_binarizer", "activation_surrogate")
            if getattr(self, name) != getattr(_Periodic, name)
        ]
        return f"{described}, frequency={self.frequency}, stage={self.stage}{''.join(others)}"

    def _set_up(
        self: Any, alpha_shape: tuple[int, ...], frequency: float, stage: int, beta: bool = False
    ) -> None:
        if not (isfinite(frequency) and frequency > 0):
            raise ValueError(f"`frequency` (={frequency}) must be a positive number.")
        options = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.alpha = nn.Parameter(torch.rand(alpha_shape, **options))
        unused = nn.Parameter(torch.ones(alpha_shape, **options), requires_grad=False)
        self.register_parameter("beta", unused if beta else None)
        self.register_buffer("tau", torch.ones((), **options))
        self.frequency = float(frequency)
        self.stage = stage


class BinaryConv2d(_Periodic, nn.Conv2d):
    """Convolve binary activations with periodic binary weights, scaled per output channel.

    With w0 = `frequency`, exactly

        F.conv2d(sign(x), sign(sin(w0 * weight)), bias, ...) * alpha        (stage 2)
        F.conv2d(sign(x), sin(w0 * weight), bias, ...) * alpha              (stage 1)

    In training mode x is first divided by sqrt(var + 1e-5) of its own sample. This changes no
    value, only the window of the surrogate gradient (`binarize_activation`). The signs are padded
    with zeros: a padded tap adds 0.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as nn.Conv2d.
        bias: add a learned bias before `alpha`; off by default, unlike nn.Conv2d.
        padding_mode, device, dtype: as nn.Conv2d.
        frequency: w0; the official scripts train with 20.
        stage: 1 or 2; may be assigned later.
        beta: keep the unused parameter `beta`, which official CIFAR checkpoints have.

    Attributes:
        weight: latent weights, any real value; their sign has no meaning.
        alpha: [out_channels, 1, 1] learned scale, initially uniform in [0, 1), later of any sign.
        beta: [out_channels, 1, 1], or None.
        tau: 0-d buffer, weight of this layer in `regularizer`.

    Source: BiPer, CVPR 2024; BinarizeConv2d in the official cifar10/modules/binarized_modules.py.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        frequency: float = 20.0,
        stage: int = 2,
        beta: bool = False,
    ) -> None:
        nn.Conv2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type, unused-ignore]
            device,
            dtype,
        )
        self._set_up((out_channels, 1, 1), frequency, stage, beta)

    def forward(self, input: Tensor) -> Tensor:
        """Return the scaled convolution of [N, in_channels, H, W] or [in_channels, H, W]."""
        weight = self.quantized_weight()
        padding: Any = self.padding
        geometry = {"stride": self.stride, "padding": padding, "dilation": self.dilation}
        if self._runs_on_bits(input, weight):
            return scaled_sign_conv2d(
                *(input, weight, self.alpha),
                surrogate=self.activation_surrogate,
                groups=self.groups,
                **geometry,
            )
        dims = (-3, -2, -1) if self.training else ()
        bits = binarize_activation(input, scale_dims=dims, surrogate=self.activation_surrogate)
        if self.training and self._can_fuse(bits):
            return scaled_conv2d(
                bits, weight, self.bias, self.alpha, groups=self.groups, **geometry
            )
        output: Tensor = self._conv_forward(bits, weight, self.bias)
        # Alpha multiplies the result, not the weights. Equal integers of stage 2 then stay equal,
        # and a max pool takes the first of them and sends the gradient there.
        return output * self.alpha

    def _runs_on_bits(self, input: Tensor, weight: Tensor) -> bool:
        """Return whether `scaled_sign_conv2d` takes this call, and is faster.

        Without a gradient for the input, the signs alone are kept: the input may change after the
        call. A subclass may have weights that are not signs.
        """
        return (
            self.training
            and self._stage == 2
            and self.bias is None
            and type(self).quantized_weight is _Periodic.quantized_weight
            and isinstance(input, Tensor)
            and input.requires_grad
            and self._can_fuse(input)
            and bits_pay(
                *(input, weight, self.alpha),
                *(self.stride, self.padding, self.dilation, self.groups),  # type: ignore[arg-type]
            )
        )

    def _can_fuse(self, bits: Tensor) -> bool:
        """Return whether `scaled_conv2d` takes this call; it mixes no types, as autocast does.

        torch.compile gets the plain product, which it can fuse with what is around.
        """
        return (
            bits.dim() == 4
            and bits.dtype == self.weight.dtype == self.alpha.dtype
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and not torch.is_autocast_enabled(bits.device.type)
            and not torch.compiler.is_compiling()
        )


class BinaryWeightConv2d(BinaryConv2d):
    """Convolve real activations with periodic binary weights: the W1A32 form of `BinaryConv2d`.

    Exactly, in both modes and in stage 2, `F.conv2d(x, sign(sin(w0 * weight)), bias, ...) * alpha`;
    stage 1 drops the outer sign. Arguments and attributes are those of `BinaryConv2d`.

    Source: BinarizeConv2d_32a in the official cifar10/modules/binarized_modules.py.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the scaled convolution of [N, in_channels, H, W] or [in_channels, H, W]."""
        output: Tensor = self._conv_forward(input, self.quantized_weight(), self.bias)
        return output * self.alpha


class BinaryLinear(_Periodic, nn.Linear):
    """Multiply binary activations with periodic binary weights, scaled per output feature.

    In eval mode, with w0 = `frequency` and in stage 2, exactly
    `F.linear(sign(x), sign(sin(w0 * weight)), bias) * alpha`; stage 1 drops the outer sign of the
    weights. In training mode each row of x is first divided by sqrt(var + 1e-5) of its own
    features; `BinaryConv2d` describes the effect.

    Args:
        in_features, out_features, device, dtype: as nn.Linear.
        bias: add a learned bias before `alpha`; off by default, unlike nn.Linear.
        frequency: w0.
        stage: 1 or 2; may be assigned later.

    Attributes:
        weight: as of `BinaryConv2d`.
        alpha: [out_features] learned scale, initially uniform in [0, 1), later of any sign.
        tau: as of `BinaryConv2d`.

    Source: the analogue of BinarizeConv2d; the official code has no binary linear layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        frequency: float = 20.0,
        stage: int = 2,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._set_up((out_features,), frequency, stage)

    def forward(self, input: Tensor) -> Tensor:
        """Return the scaled product of [..., in_features]."""
        dims = (-1,) if self.training else ()
        bits = binarize_activation(input, scale_dims=dims, surrogate=self.activation_surrogate)
        return F.linear(bits, self.quantized_weight(), self.bias) * self.alpha


def set_tau(module: nn.Module, tau: float) -> None:
    """Set the regulariser's weight in every layer of `module` with periodic weights."""
    for layer in _periodic_layers(module):
        layer.tau.fill_(tau)


def set_binarizers(
    module: nn.Module, *, weight: str | None = None, activation: str | None = None
) -> None:
    """Change how the layers of BiPer in `module` binarize, in place.

    Args:
        module: with `BinaryConv2d` and its kin; other layers stay as they are.
        weight: "periodic", "sign", "sawtooth" or "triangle"; None leaves it.
        activation: surrogate gradient of the sign, "bireal", "clip" or "identity"; None leaves it.

    Raises:
        ValueError: unknown name; the message has the closest one.
    """
    if weight is not None:
        known_name("weight binarizer", weight, tuple(WEIGHT_BINARIZERS))
    if activation is not None:
        known_name("activation surrogate", activation, ACTIVATION_SURROGATES)
    for layer in _periodic_layers(module):
        layer.weight_binarizer = weight or layer.weight_binarizer
        layer.activation_surrogate = activation or layer.activation_surrogate


def regularizer(module: nn.Module) -> Tensor:
    """Return the periodic weight decay of BiPer, to be added to the loss in both stages.

    It is the sum over layers with periodic weights of `tau * mean(0.5 - 0.5*cos(2*w0*w))`, which is
    `tau * mean(sin(w0*w)**2)`, with each layer's own `tau` buffer (1 until `set_tau`) and w0.
    It is smallest, 0, where every sine is 0. No gradient reaches `tau`. A layer with another weight
    binarizer than "periodic" has the square of that one's wave in the place of the sine's.

    Args:
        module: a module with periodic weights; without them the result is 0.

    Returns:
        0-d tensor.

    Source: loss_reg in the official cifar10/main.py, where tau is a buffer of each layer as well.
    """
    total = torch.zeros(())
    for layer in _periodic_layers(module):
        mean = _mean_square(layer)
        total = total.to(mean.device) + layer.tau * mean
    return total


def _mean_square(layer: BinaryConv2d | BinaryLinear) -> Tensor:
    if layer.weight_binarizer == "periodic":  # in the form of the official code
        return torch.mean(0.5 - 0.5 * torch.cos(2 * layer.frequency * layer.weight))
    return wave(layer.weight, layer.frequency, layer.weight_binarizer).square().mean()


def _periodic_layers(module: nn.Module) -> list[BinaryConv2d | BinaryLinear]:
    layers = (layer for _, layer in binary_layers(module))
    return [layer for layer in layers if isinstance(layer, BinaryConv2d | BinaryLinear)]
