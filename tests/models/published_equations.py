"""ReActNet, BNext, Bi-Real Net, AdaBin and BinaryViT as equations on a state dict.

They follow the papers and share nothing with `biper_engine`: every surrogate is a formula, and
autograd derives the gradients with which those of the package are compared. Weights are binary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Published"]


def _through(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return exactly `value`, with the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


def sign(x: Tensor) -> Tensor:
    """Sign with Bi-Real Net's surrogate: a parabola on each side of 0, constant beyond 1."""
    clipped = x.clamp(-1, 1)
    return _through(x.sign(), clipped * (2 - clipped.abs()))


@dataclass(frozen=True)
class Published:
    """The layers of one network: tensors by name, in training or in eval mode."""

    state: Mapping[str, Tensor]
    training: bool

    def has(self, name: str) -> bool:
        return any(key == name or key.startswith(f"{name}.") for key in self.state)

    def real_conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        bias = self.state.get(f"{name}.bias")
        return F.conv2d(x, self.state[f"{name}.weight"], bias, stride, padding)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        """BatchNorm; of tokens [N, T, C] over the last dimension."""
        entries = ("running_mean", "running_var", "weight", "bias")
        mean, variance, weight, bias = (self.state[f"{name}.{entry}"] for entry in entries)
        if x.dim() == 3:
            if self.training:
                mean, variance = x.mean((0, 1)), x.var((0, 1), correction=0)
            return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias
        if self.training:
            return F.batch_norm(x, None, None, weight, bias, training=True)
        return F.batch_norm(x, mean, variance, weight, bias)

    def prelu(self, name: str, x: Tensor) -> Tensor:
        slope = self.state[f"{name}.weight"].view(-1, 1, 1)
        return torch.where(x >= 0, x, slope * x)

    def shift(self, name: str, x: Tensor) -> Tensor:
        return x + self.state[f"{name}.bias"]

    def scaled_conv(self, name: str, x: Tensor, size: int, stride: int = 1) -> Tensor:
        """x conv mean|w| * sign(w); the surrogate of the whole weight is w between -1 and 1."""
        if f"{name}.weights" in self.state:
            weight = self.state[f"{name}.weights"].view(-1, x.shape[1], size, size)
        else:
            weight = self.state[f"{name}.weight"]
        scale = weight.abs().mean((1, 2, 3), keepdim=True)
        binary = _through(scale * weight.sign(), weight.clamp(-1, 1))
        return F.conv2d(x, binary, None, stride, size // 2 if size == 3 else 0)

    def bireal(self, x: Tensor) -> Tensor:
        x = self.norm("bn1", self.real_conv("conv1", x, padding=1))
        for layer in range(1, 5):
            for index in range(4):
                block = f"layer{layer}.{index}"
                stride = 2 if layer > 1 and index == 0 else 1
                y = self.scaled_conv(f"{block}.binary_conv", sign(x), 3, stride)
                x = self.norm(f"{block}.bn1", y) + self._projected(block, x, stride)
        return self.linear("fc", x.mean((2, 3)))

    def react_resnet(self, x: Tensor) -> Tensor:
        x = self.norm("bn1", self.real_conv("conv1", x, 2, 3))
        x = F.max_pool2d(x, 3, 2, 1)
        for layer in range(1, 5):
            for index in range(4):
                block = f"layer{layer}.{index}"
                stride = 2 if layer > 1 and index == 0 else 1
                bits = sign(self.shift(f"{block}.move0", x))
                y = self.norm(
                    f"{block}.bn1", self.scaled_conv(f"{block}.binary_conv", bits, 3, stride)
                )
                y = self.shift(f"{block}.move1", y + self._projected(block, x, stride))
                x = self.shift(f"{block}.move2", self.prelu(f"{block}.prelu", y))
        return self.linear("fc", x.mean((2, 3)))

    def _projected(self, block: str, x: Tensor, stride: int) -> Tensor:
        if not self.has(f"{block}.downsample"):
            return x
        pooled = F.avg_pool2d(x, 2, stride)
        return self.norm(f"{block}.downsample.2", self.real_conv(f"{block}.downsample.1", pooled))

    def reactnet_a(self, x: Tensor) -> Tensor:
        x = self.norm("feature.0.bn1", self.real_conv("feature.0.conv1", x, 2, 1))
        for index in range(1, 14):
            block = f"feature.{index}"
            stride = 2 if index in (2, 4, 6, 12) else 1
            bits = sign(self.shift(f"{block}.move11", x))
            y = self.scaled_conv(f"{block}.binary_3x3", bits, 3, stride)
            y = self.norm(f"{block}.bn1", y) + (F.avg_pool2d(x, 2) if stride == 2 else x)
            y = self.prelu(f"{block}.prelu1", self.shift(f"{block}.move12", y))
            y = self.shift(f"{block}.move13", y)
            bits = sign(self.shift(f"{block}.move21", y))
            pairs = [("binary_pw", "bn2")]
            if not self.has(f"{block}.binary_pw"):
                pairs = [("binary_pw_down1", "bn2_1"), ("binary_pw_down2", "bn2_2")]
            parts = [
                self.norm(f"{block}.{norm}", self.scaled_conv(f"{block}.{conv}", bits, 1)) + y
                for conv, norm in pairs
            ]
            x = self.prelu(f"{block}.prelu2", self.shift(f"{block}.move22", torch.cat(parts, 1)))
            x = self.shift(f"{block}.move23", x)
        return self.linear("fc", x.mean((2, 3)))

    def adabin(self, x: Tensor) -> Tensor:
        x = self._maxout("nonlinear1", self.norm("bn1", self.real_conv("conv1", x, padding=1)))
        for layer in range(1, 4):
            for index in range(3):
                block = f"layer{layer}.{index}"
                stride = 2 if layer > 1 and index == 0 else 1
                shortcut = x
                if stride == 2:
                    quarter = x.shape[1] // 2
                    zeros = x.new_zeros(len(x), quarter, x.shape[2] // 2, x.shape[3] // 2)
                    shortcut = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
                for number, step in ((1, stride), (2, 1)):
                    y = self._adaptive_conv(f"{block}.conv{number}", x, step)
                    y = self.norm(f"{block}.bn{number}", y) + shortcut
                    x = shortcut = self._maxout(f"{block}.nonlinear{number}", y)
        x = x.mean((2, 3))
        return self.linear("linear", self.norm("bn2", x[:, :, None, None]).flatten(1))

    def _maxout(self, name: str, x: Tensor) -> Tensor:
        positive, negative = (
            self.state[f"{name}.{which}_scale"].view(-1, 1, 1) for which in ("pos", "neg")
        )
        return torch.where(x > 0, positive * x, negative * x)

    def _adaptive_conv(self, name: str, x: Tensor, stride: int) -> Tensor:
        distance, center = (self.state[f"{name}.binary_a.{key}_a"] for key in ("alpha", "beta"))
        bits = distance * (sign((x - center) / distance) + center)
        weight = self.state[f"{name}.weight"]
        mean = weight.mean((1, 2, 3), keepdim=True)
        deviation = ((weight - mean) ** 2).mean((1, 2, 3), keepdim=True).sqrt()
        unit = (weight - mean) / deviation
        binary = _through(unit.sign(), 10 * torch.tanh(0.1 * unit))
        return F.conv2d(bits, binary * deviation + mean, None, stride, 1)

    def bnext(self, x: Tensor) -> Tensor:
        x = self.norm("feature.0.bn1", self.real_conv("feature.0.conv1", x, 2, 1))
        index = 1
        while self.has(f"feature.{index}"):
            block = f"feature.{index}"
            doubled_before = index > 1 and self.has(f"{block}.FFN_1")
            name, stride = f"{block}.Attention", 2 if doubled_before else 1
            y = self._processed(name, x, 3, stride, self.state[f"{name}.scale"])
            halved = F.avg_pool2d if stride == 2 else lambda x, _: x
            if index % 2 == 0:
                shortcut = halved(self.prelu(f"{name}.activation1", x), 2)
                x = self.norm(f"{name}.norm2", y * shortcut) + shortcut
            else:
                x = self.norm(f"{name}.norm2", y) + halved(x, 2)
            names = ["FFN"] if self.has(f"{block}.FFN") else ["FFN_1", "FFN_2"]
            parts = []
            for part in (f"{block}.{name}" for name in names):
                scale = self.state[f"{part}.scale"].clamp(0, 1)
                y = self._processed(part, x, 1, 1, scale)
                parts.append(self.norm(f"{part}.norm2", y) + x)
            x = torch.cat(parts, 1)
            index += 1
        return self.linear("fc", self.prelu("prelu", x).mean((2, 3)))

    def _processed(self, name: str, x: Tensor, size: int, stride: int, scale: Tensor) -> Tensor:
        moved = self.shift(f"{name}.move", x)
        bits = _through(moved.sign(), moved.clamp(-1.5, 1.5))
        weight = self.state[f"{name}.binary_conv.weight"]
        y = F.conv2d(bits, _through(weight.sign(), weight), None, stride, size // 2)
        y = self.prelu(f"{name}.activation2", self.norm(f"{name}.norm1", y))
        mixture = scale * (F.avg_pool2d(x, 2) if stride == 2 else x) + (1 - scale) * y
        squeezed = mixture.mean((2, 3), keepdim=True)
        hidden = self.real_conv(f"{name}.se.se.1", squeezed).clamp(min=0)
        return y / (1 + torch.exp(-self.real_conv(f"{name}.se.se.3", hidden)))

    def binaryvit(self, x: Tensor) -> Tensor:
        x = self.real_conv("vit.embeddings.patch_embeddings.projection", x, 4).flatten(2).mT
        x = self.norm("vit.embeddings.norm", x) + self.state["vit.embeddings.position_embeddings"]
        index, merged = 0, 1
        while self.has(f"vit.encoder.layer.{index}"):
            name = f"vit.encoder.layer.{index}"
            if x.shape[2] != len(self.state[f"{name}.layernorm_before.weight"]):
                x = self._merged(f"vit.encoder.patch_embed{merged}", x)
                merged += 1
            x = self._layer(name, x)
            index += 1
        return self.linear("classifier", self.norm("vit.layernorm", x).mean(1))

    def _layer(self, name: str, x: Tensor) -> Tensor:
        attended = self._attention(
            f"{name}.attention.attention", self.norm(f"{name}.layernorm_before", x)
        )
        attended = self._projection(f"{name}.attention.output", attended, attended)
        x = self._affine(f"{name}.attention.output.layerscale", attended) + x
        normed = self.norm(f"{name}.layernorm_after", x)
        hidden = len(self.state[f"{name}.output.move"])
        repeated = torch.cat([normed] * (hidden // normed.shape[2]), 2)
        y = self._projection(f"{name}.intermediate", normed, repeated)
        groups = y.unflatten(2, (normed.shape[2], -1)).mean(3)
        y = self._projection(f"{name}.output", y, groups)
        y = self._affine(f"{name}.output.layerscale", y) + x
        pixels = self._pixels(normed)
        for length in (3, 5):
            for axis, window in (("h", (length, 1)), ("w", (1, length))):
                pads = (window[0] // 2, window[1] // 2)
                means = F.avg_pool2d(pixels, window, 1, pads).flatten(2).mT
                y = y + self._affine(f"{name}.layerscale_{axis}{length}", means)
        return y

    def _merged(self, name: str, x: Tensor) -> Tensor:
        pixels = self._pixels(self.norm(f"{name}.norm0", x))
        bits = sign(pixels + self.state[f"{name}.move"])
        weight = self.state[f"{name}.proj.weight"]
        scale = weight.abs().mean((1, 2, 3), keepdim=True)
        binary = _through(scale * weight.sign(), weight.clamp(-1, 1))
        y = self.norm(f"{name}.norm", F.conv2d(bits, binary, None, 2).flatten(2).mT)
        pooled = F.avg_pool2d(pixels, 2).flatten(2).mT
        y = self._rprelu(f"{name}.rprelu", y + torch.cat([pooled, pooled], 2))
        return y + self.state[f"{name}.position_embeddings"]

    def _attention(self, name: str, x: Tensor) -> Tensor:
        state, small = self.state, x
        if self.has(f"{name}.reduction"):
            width = x.shape[2]
            reduction = 8 if width == len(state["vit.embeddings.norm.weight"]) else 4
            small = F.avg_pool2d(self._pixels(x), reduction).flatten(2).mT
            y = self._dense(f"{name}.reduction", sign(small + state[f"{name}.mover"]))
            small = self._rprelu(f"{name}.rprelur", self.norm(f"{name}.norm_r", y) + small)
        maps = {}
        for key, long, given in (("q", "query", x), ("k", "key", small), ("v", "value", small)):
            y = self._dense(f"{name}.{long}", sign(given + state[f"{name}.move{key}"]))
            maps[key] = self._rprelu(
                f"{name}.rprelu{key}", self.norm(f"{name}.norm{key}", y) + given
            )
        head = len(state["vit.embeddings.norm.weight"])
        q, k, v = (
            sign(maps[key] + state[f"{name}.move{key}2"]).unflatten(2, (-1, head)).movedim(2, 1)
            for key in "qkv"
        )
        shares = torch.softmax(q @ k.mT / sqrt(head), -1) / state[f"{name}.att_prob_clip"]
        bits = _through(shares.round().clamp(0, 1), shares.clamp(0, 1))
        context = (bits * state[f"{name}.att_prob_clip"] @ v).movedim(1, 2).flatten(2)
        y = self.norm(f"{name}.norm_context", context) + maps["q"]
        for key in "kv":
            times = isqrt(x.shape[1] // small.shape[1])
            pixels = self._pixels(maps[key]).repeat_interleave(times, 2)
            y = y + pixels.repeat_interleave(times, 3).flatten(2).mT
        return self._rprelu(f"{name}.rprelu_context", y)

    def _projection(self, name: str, x: Tensor, shortcut: Tensor) -> Tensor:
        y = self._dense(f"{name}.dense", sign(x + self.state[f"{name}.move"]))
        return self._rprelu(f"{name}.rprelu", self.norm(f"{name}.norm", y) + shortcut)

    def _dense(self, name: str, x: Tensor) -> Tensor:
        weight = self.state[f"{name}.weight"]
        scale = weight.abs().mean(1, keepdim=True)
        centred = weight - weight.mean(1, keepdim=True)
        return x @ _through(scale * centred.sign(), centred.clamp(-1, 1)).T

    def _rprelu(self, name: str, x: Tensor) -> Tensor:
        moved = x - self.state[f"{name}.move1"]
        slope = self.state[f"{name}.prelu.weight"]
        return torch.where(moved >= 0, moved, slope * moved) + self.state[f"{name}.move2"]

    def _affine(self, name: str, x: Tensor) -> Tensor:
        return x * self.state[f"{name}.alpha"] + self.state[f"{name}.move"]

    def _pixels(self, tokens: Tensor) -> Tensor:
        side = isqrt(tokens.shape[1])
        return tokens.mT.unflatten(2, (side, side))
