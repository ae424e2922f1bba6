"""BinaryViT: a pyramid of transformer layers with binary weights and activations.

The embedding of 4x4 patches and the classifier stay real. The products of queries with keys and of
attention with values have two binary operands. Parameter names and shapes are those of the official
code, transformer/modeling_vit_extra_res_pyramid.py of github.com/Phuoc-Hoan-Le/BinaryViT, with
BatchNorm in place of LayerNorm and averages over 3 and 5 tokens, as its script trains it.

Source: Le and Li, "BinaryViT: Pushing Binary Vision Transformers Towards Convolutional Models",
CVPR workshops 2023, arXiv:2306.16678.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.models.network import Network
from biper_engine.nn import RPReLU, SignConv2d, SignLinear, binarize_activation, straight_through

__all__ = ["BinaryViT"]

_PATCH = 4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the layers of one resolution.

    Attributes:
        width: channels of a token.
        hidden: channels between the two products of the feed-forward part.
        heads: of the attention.
        reduction: the map of keys and values is this many times smaller along each axis.
        depth: number of layers.
        side: tokens along each axis.
    """

    width: int
    hidden: int
    heads: int
    reduction: int
    depth: int
    side: int


def _shapes(image_size: int, width: int, depths: tuple[int, int, int, int]) -> list[Shape]:
    # Hidden channels in multiples of a token's, and the reduction, at each resolution.
    table = ((8, 8), (8, 4), (4, 1), (4, 1))
    return [
        Shape(
            width=width * 2**index,
            hidden=width * 2**index * multiple,
            heads=2**index,
            reduction=reduction,
            depth=depth,
            side=image_size // _PATCH // 2**index,
        )
        for index, ((multiple, reduction), depth) in enumerate(zip(table, depths, strict=True))
    ]


class TokenNorm(nn.BatchNorm1d):
    """BatchNorm over the channels of tokens [N, T, C]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class Affine(nn.Module):
    """Multiply each channel of tokens by `alpha` and add `move`."""

    def __init__(self, channels: int, first: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((channels,), first))
        self.move = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha + self.move


def _rprelu(channels: int) -> RPReLU:
    return RPReLU(channels, dim=-1)


def _shift(channels: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(channels))


def _as_map(tokens: Tensor, side: int) -> Tensor:
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], side, side)


def _as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """Attention of binary queries, keys and values, with a shortcut around each product."""

    def __init__(self, shape: Shape, *, stage: int) -> None:
        super().__init__()
        width = shape.width
        self.moveq, self.movek, self.movev = (_shift(width) for _ in range(3))
        self.query, self.key, self.value = (SignLinear(width, width, stage=stage) for _ in range(3))
        if shape.reduction > 1:
            self.mover = _shift(width)
            self.reduction = SignLinear(width, width, stage=stage)
            self.norm_r = TokenNorm(width)
            self.rprelur = _rprelu(width)
        self.normq, self.normk, self.normv = (TokenNorm(width) for _ in range(3))
        self.rpreluq, self.rpreluk, self.rpreluv = (_rprelu(width) for _ in range(3))
        self.moveq2, self.movek2, self.movev2 = (_shift(width) for _ in range(3))
        self.att_prob_clip = nn.Parameter(torch.tensor(0.005))
        self.norm_context = TokenNorm(width)
        self.rprelu_context = _rprelu(width)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        query = self.normq(self.query(binarize_activation(x + self.moveq))) + x
        reduced = self._reduced(x)
        key = self.normk(self.key(binarize_activation(reduced + self.movek))) + reduced
        value = self.normv(self.value(binarize_activation(reduced + self.movev))) + reduced
        query, key, value = self.rpreluq(query), self.rpreluk(key), self.rpreluv(value)
        context = self._attention(query + self.moveq2, key + self.movek2, value + self.movev2)
        shortcuts = query + self._enlarged(key) + self._enlarged(value)
        activated: Tensor = self.rprelu_context(self.norm_context(context) + shortcuts)
        return activated

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (self._heads(binarize_activation(x)) for x in (query, key, value))
        scores = query @ key.transpose(-1, -2) / sqrt(self.shape.width // self.shape.heads)
        context = self._binarized(scores.softmax(-1)) @ value
        return context.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        """Return [N, heads, T, C / heads]."""
        return x.reshape(*x.shape[:2], self.shape.heads, -1).transpose(1, 2)

    def _binarized(self, attention: Tensor) -> Tensor:
        """Return 0 or `att_prob_clip`, whichever is closer: BiT's quantizer of one bit."""
        ratio = attention / self.att_prob_clip
        bits = straight_through(ratio.detach().round().clamp(0, 1), ratio.clamp(0, 1))
        return bits * self.att_prob_clip

    def _reduced(self, x: Tensor) -> Tensor:
        if self.shape.reduction == 1:
            return x
        pooled = F.avg_pool2d(_as_map(x, self.shape.side), self.shape.reduction)
        x = _as_tokens(pooled)
        x = self.norm_r(self.reduction(binarize_activation(x + self.mover))) + x
        activated: Tensor = self.rprelur(x)
        return activated

    def _enlarged(self, x: Tensor) -> Tensor:
        if self.shape.reduction == 1:
            return x
        small = _as_map(x, self.shape.side // self.shape.reduction)
        return _as_tokens(F.interpolate(small, size=(self.shape.side,) * 2, mode="nearest"))


class Projection(nn.Module):
    """A binary product of the shifted input with BatchNorm, a shortcut, and RPReLU."""

    def __init__(self, in_features: int, features: int, *, stage: int) -> None:
        super().__init__()
        self.dense = SignLinear(in_features, features, stage=stage)
        self.move = _shift(in_features)
        self.norm = TokenNorm(features)
        self.rprelu = _rprelu(features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dense(binarize_activation(x + self.move))) + self.shortcut(x)
        activated: Tensor = self.rprelu(y)
        return activated

    def shortcut(self, x: Tensor) -> Tensor:
        """Return x with as many channels as the result: repeated, or averaged in groups."""
        have, wanted = self.dense.in_features, self.dense.out_features
        if have <= wanted:
            return x if have == wanted else torch.cat([x] * (wanted // have), -1)
        return F.avg_pool1d(x, have // wanted)


class ScaledProjection(Projection):
    """The same with a factor and a shift of each channel at the end."""

    def __init__(self, in_features: int, features: int, *, stage: int) -> None:
        super().__init__(in_features, features, stage=stage)
        self.layerscale = Affine(features, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.layerscale(super().forward(x))
        return scaled


class Attention(nn.Module):
    """Self-attention and the projection behind it."""

    def __init__(self, shape: Shape, *, stage: int) -> None:
        super().__init__()
        self.attention = SelfAttention(shape, stage=stage)
        self.output = ScaledProjection(shape.width, shape.width, stage=stage)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.output(self.attention(x))
        return projected


class Layer(nn.Module):
    """Attention, then a feed-forward part beside averages over rows and columns of tokens."""

    def __init__(self, shape: Shape, *, stage: int) -> None:
        super().__init__()
        width = shape.width
        self.attention = Attention(shape, stage=stage)
        self.intermediate = Projection(width, shape.hidden, stage=stage)
        self.output = ScaledProjection(shape.hidden, width, stage=stage)
        self.layernorm_before = TokenNorm(width)
        self.layernorm_after = TokenNorm(width)
        for name in ("w5", "h5", "w3", "h3"):
            self.add_module(f"layerscale_{name}", Affine(width, 0.0))
        self.side = shape.side

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.layernorm_before(x)) + x
        normed = self.layernorm_after(x)
        y: Tensor = self.output(self.intermediate(normed)) + x
        pixels = _as_map(normed, self.side)
        for length in (3, 5):
            y = y + self._averaged(pixels, "h", (length, 1))
            y = y + self._averaged(pixels, "w", (1, length))
        return y

    def _averaged(self, pixels: Tensor, axis: str, window: tuple[int, int]) -> Tensor:
        padding = (window[0] // 2, window[1] // 2)
        averages = F.avg_pool2d(pixels, window, stride=1, padding=padding)
        scale = self.get_submodule(f"layerscale_{axis}{max(window)}")
        scaled: Tensor = scale(_as_tokens(averages))
        return scaled


class Merge(nn.Module):
    """A binary 2x2 convolution of stride 2 between two resolutions."""

    def __init__(self, shape: Shape, width: int, *, stage: int) -> None:
        super().__init__()
        self.norm0 = TokenNorm(shape.width)
        self.move = nn.Parameter(torch.zeros(1, shape.width, 1, 1))
        self.proj = SignConv2d(shape.width, width, 2, 2, stage=stage)
        self.norm = TokenNorm(width)
        self.rprelu = _rprelu(width)
        self.position_embeddings = _positions(shape.side // 2, width)
        self.side = shape.side

    def forward(self, x: Tensor) -> Tensor:
        pixels = _as_map(self.norm0(x), self.side)
        y = _as_tokens(self.proj(binarize_activation(pixels + self.move)))
        pooled = _as_tokens(F.avg_pool2d(pixels, 2))
        shortcut = torch.cat([pooled] * (y.shape[-1] // pooled.shape[-1]), -1)
        activated: Tensor = self.rprelu(self.norm(y) + shortcut)
        return activated + self.position_embeddings


def _positions(side: int, width: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, side**2, width), std=0.02))


class PatchEmbedding(nn.Module):
    """A real convolution of 4x4 patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, _PATCH, _PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return _as_tokens(self.projection(x))


class Embedding(nn.Module):
    """Tokens of an image: patches, BatchNorm, positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.patch_embeddings = PatchEmbedding(shape.width)
        self.position_embeddings = _positions(shape.side, shape.width)
        self.norm = TokenNorm(shape.width)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.patch_embeddings(x))
        return normed + self.position_embeddings


class Encoder(nn.Module):
    """All layers, and what is between their resolutions."""

    def __init__(self, shapes: list[Shape], *, stage: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(shape, stage=stage) for shape in shapes for _ in range(shape.depth)
        )
        for index, shape in enumerate(shapes[:-1]):
            merge = Merge(shape, shapes[index + 1].width, stage=stage)
            self.add_module(f"patch_embed{index + 1}", merge)
        self.depths = [shape.depth for shape in shapes]

    def forward(self, x: Tensor) -> Tensor:
        first = 0
        for index, depth in enumerate(self.depths):
            if index > 0:
                x = self.get_submodule(f"patch_embed{index}")(x)
            for layer in self.layer[first : first + depth]:
                x = layer(x)
            first += depth
        return x


class Body(nn.Module):
    """Everything but the classifier."""

    def __init__(self, shapes: list[Shape], *, stage: int) -> None:
        super().__init__()
        self.embeddings = Embedding(shapes[0])
        self.encoder = Encoder(shapes, stage=stage)
        self.layernorm = TokenNorm(shapes[-1].width)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.layernorm(self.encoder(self.embeddings(x)))
        return normed


class BinaryViT(Network):
    """19 layers of 64 to 512 channels in four resolutions.

    Args:
        image_size: a multiple of 32; the position embeddings are of this size.
        width: channels of a token at the finest resolution, and of each head at all of them.
        depths: layers at each resolution.
    """

    input_shape = (3, 224, 224)

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        image_size: int = 224,
        width: int = 64,
        depths: tuple[int, int, int, int] = (3, 4, 8, 4),
        stage: int = 2,
    ) -> None:
        super().__init__()
        if image_size < 32 or image_size % 32:
            raise ValueError(f"`image_size` (={image_size}) must be a multiple of 32.")
        shapes = _shapes(image_size, width, depths)
        self.input_shape = (3, image_size, image_size)
        self.vit = Body(shapes, stage=stage)
        self.classifier = nn.Linear(shapes[-1].width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, image_size, image_size]."""
        logits: Tensor = self.classifier(self.vit(x).mean(1))
        return logits
