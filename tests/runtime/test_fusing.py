"""Fused float ends: which operators become one; only rounding changes."""

import math
from typing import Any

import pytest
import torch
from torch import fx

from biper_engine.runtime.fusing import MAX_STEM_CHANNELS
from tests.images import images
from tests.networks_by_hand import GraphBuilder
from tests.runtime.fused_graphs import (
    StemBuilder,
    assert_bits_agree,
    fused,
    operators,
    options,
    the,
)

_aten, _biper = torch.ops.aten, torch.ops.biper


# -- stems ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["", "pool", "clamp", "pool clamp", "clamp pool"])
@pytest.mark.parametrize("floats", [False, True])
def test_what_follows_the_convolution_of_images_is_fused(order: str, floats: bool) -> None:
    g = StemBuilder()
    last = g.conv(g.x, 7, [2, 2], [3, 3], [1, 1], 1)
    for step in order.split():
        if step == "pool":
            last = g.call("pool", _aten.max_pool2d.default, last, [3, 3], [2, 2], [1, 1])
        else:
            last = g.call("clamp", _aten.hardtanh.default, last, -0.7, 0.6)
    bits = g.bits(last)
    module = g.module(bits, last) if floats else g.module(bits)
    result = fused(module, (3, 21, 18))
    op = "stem" if floats else "stem_bits"
    assert operators(result) == [op]
    given = options(result, op)
    assert given["stride"] == [2, 2]
    assert given["padding"] == [3, 3, 3, 3]
    assert ("pool_kernel_size" in given) == ("pool" in order)
    assert (given["clamp_min"], given["clamp_max"]) == (
        (-0.7, 0.6) if "clamp" in order else (None,) * 2
    )
    x = images(4, 3, 21, 18)
    came, wanted = result(x), module(x)
    # Sums of 148 terms in float32 against float64: a bit flips where v is that close to it.
    assert_bits_agree(came[0], wanted[0], 40, 1e-4)
    if floats:
        # 148 terms of magnitudes below 1, each sum rounded to 2^-24 of at most 16.
        assert bool(((came[1] - wanted[1]).abs() <= 148 * 16 * 2.0**-24).all())


@pytest.mark.parametrize(
    ("target", "arguments", "limits"),
    [
        (_aten.relu.default, (), (0.0, None)),
        (_aten.clamp.default, (None, 0.5), (None, 0.5)),
        (_aten.clamp.default, (-1,), (-1.0, None)),
        (_aten.hardtanh.default, (), (-1.0, 1.0)),
    ],
)
def test_every_clamp_is_fused(target: Any, arguments: tuple[Any, ...], limits: Any) -> None:
    g = StemBuilder()
    clamp = g.call("clamp", target, g.conv(g.x), *arguments)
    given = options(fused(g.module(g.bits(clamp)), (3, 8, 8)), "stem_bits")
    assert (given["clamp_min"], given["clamp_max"]) == limits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_conversion_of_the_images_is_fused(dtype: torch.dtype) -> None:
    g = StemBuilder(dtype=dtype)
    clamp = g.call("clamp", _aten.hardtanh.default, g.conv(g.cast(g.x, dtype, "half")))
    module = g.module(g.bits(clamp), clamp)
    result = fused(module, (3, 9, 9))
    assert operators(result) == ["stem"]
    given = options(result, "stem")
    assert given["dtype"] == dtype
    assert given["weight"].dtype == given["bias"].dtype == torch.float32
    x = images(8, 3, 9, 9)
    came, wanted = result(x), module(x)
    assert came[1].dtype == dtype
    # Two roundings of values below 1, of the sum and of the sum with its bias, against one.
    eps = torch.finfo(dtype).eps
    assert bool(((came[1].float() - wanted[1].float()).abs() <= 2 * eps).all())
    assert_bits_agree(came[0], wanted[0], 40, 4 * eps)


def normalised(form: str) -> tuple[StemBuilder, fx.Node, torch.dtype]:
    """Return a network in the making, and its images normalised in one of several ways."""
    g = StemBuilder(dtype=torch.float16 if "half" in form else torch.float32)
    mean = g.constant("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
    std = g.constant("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
    x, dtype = g.x, torch.uint8
    if "bytes" in form:
        x = g.call("unit", _aten.div.Tensor, g.cast(x, torch.float32, "floats"), 255)
    elif "direct" in form:
        x = g.call("unit", _aten.div.Tensor, x, 255.0)
    else:
        dtype = torch.float32
    if "reversed" in form:
        x = g.call("centred", _aten.sub.Tensor, mean, x)
    elif "alpha" in form:
        x = g.call("centred", _aten.add.Tensor, x, mean, alpha=-2)
    else:
        x = g.call("centred", _aten.sub.Tensor, x, mean)
    x = g.call("scaled", _aten.div.Tensor, x, std)
    if "half" in form:
        x = g.cast(x, torch.float16, "half")
    return g, x, dtype


@pytest.mark.parametrize(
    "form", ["floats", "bytes", "direct", "bytes half", "floats reversed", "bytes alpha"]
)
def test_the_networks_own_normalisation_is_fused(form: str) -> None:
    g, x, dtype = normalised(form)
    conv = g.conv(x)
    module = g.module(g.bits(conv), conv)
    result = fused(module, (3, 9, 9), dtype=dtype)
    assert operators(result) == ["stem"]
    given = options(result, "stem")
    assert given["scale"].shape == given["offset"].shape == (3,)
    if dtype == torch.uint8:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (4, 3, 9, 9), generator=generator, dtype=dtype)
    else:
        pixels = images(4, 3, 9, 9)
    came, wanted = result(pixels), module(pixels)
    # Pixels below 16 after three roundings, or sixteen half ulps, through weights of 27 / 9.
    eps = torch.finfo(came[1].dtype).eps
    assert bool(((came[1].float() - wanted[1].float()).abs() <= 64 * 3 * eps).all())
    assert_bits_agree(came[0], wanted[0], 40, 200 * eps)


def test_padding_stays_zero_where_the_normalisation_is_fused() -> None:
    g = StemBuilder(out=1)
    shifted = g.call("shifted", _aten.add.Tensor, g.x, 100.0)
    conv = g.conv(shifted)
    module = g.module(conv, g.bits(conv))
    result = fused(module, (3, 4, 4))
    x = images(1, 3, 4, 4)
    assert operators(result) == ["stem"]
    assert torch.allclose(result(x)[0], module(x)[0], rtol=1e-5)


def test_bytes_that_wrap_around_are_not_folded() -> None:
    g = StemBuilder()
    wrapped = g.call("wrapped", _aten.add.Tensor, g.x, 200)
    conv = g.conv(g.cast(wrapped, torch.float32, "floats"))
    module = g.module(g.bits(conv))
    result = fused(module, (3, 9, 9), dtype=torch.uint8)
    assert operators(result) == ["add", "stem_bits"]
    assert the(result, "stem_bits").args[0].name == "wrapped"  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 9, 9), generator=generator, dtype=torch.uint8)
    assert_bits_agree(result(pixels)[0], module(pixels)[0], 40, 1e-3)


def test_a_constant_that_is_not_per_channel_is_not_folded() -> None:
    g = StemBuilder()
    image = g.constant("image", images(1, 3, 9, 9))
    conv = g.conv(g.call("centred", _aten.sub.Tensor, g.x, image))
    result = fused(g.module(g.bits(conv)), (3, 9, 9))
    assert operators(result) == ["sub", "stem_bits"]


def test_other_users_of_the_images_keep_them() -> None:
    g = StemBuilder()
    half = g.call("doubled", _aten.mul.Tensor, g.x, 2.0)
    conv = g.conv(half)
    module = g.module(g.bits(conv), half)
    result = fused(module, (3, 9, 9))
    assert sorted(operators(result)) == ["mul", "stem_bits"]
    x = images(2, 3, 9, 9)
    assert torch.equal(result(x)[1], module(x)[1])


def test_equal_bits_are_made_once_and_others_stay() -> None:
    g = StemBuilder()
    conv = g.conv(g.x)
    first = g.bits(conv)
    again = g.call("again", _biper.binarize.default, *first.args)
    other = g.call("other", _biper.binarize.default, conv)
    module = g.module(first, again, other)
    result = fused(module, (3, 8, 8))
    assert operators(result) == ["stem", "binarize"]
    x = images(2, 3, 8, 8)
    for came, wanted in zip(result(x), module(x), strict=True):
        assert_bits_agree(came, wanted, 40, 1e-3)


def test_floats_alone_are_fused_with_what_follows() -> None:
    g = StemBuilder()
    module = g.module(g.call("clamp", _aten.relu.default, g.conv(g.x)))
    result = fused(module, (3, 8, 8))
    assert operators(result) == ["stem"]
    x = images(2, 3, 8, 8)
    assert torch.allclose(result(x)[0], module(x)[0], atol=1e-5)


CONVOLUTIONS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "too many channels": (MAX_STEM_CHANNELS + 1, ([1, 1], [1])),
    "dilation": (4, ([1, 1], [1, 1], [2, 2])),
    "groups": (4, ([1, 1], [1], [1], 2)),
}


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_other_convolutions_stay(form: str) -> None:
    channels, arguments = CONVOLUTIONS[form]
    g = StemBuilder()
    groups = arguments[3] if len(arguments) > 3 else 1
    weight = g.constant("w", g.normal(40, channels // groups, 3, 3))
    conv = g.call("conv", _aten.conv2d.default, g.x, weight, None, *arguments)
    module = g.module(g.bits(conv))
    assert fused(module, (channels, 8, 8)) is module


def test_a_kernel_too_large_for_a_block_of_every_gpu_stays() -> None:
    for size, is_fused in ((11, True), (12, False)):
        g = StemBuilder()
        weight = g.constant("w", g.normal(40, 3, size, size))
        conv = g.call("conv", _aten.conv2d.default, g.x, weight, None, [4, 4])
        module = g.module(g.bits(conv))
        assert (fused(module, (3, 24, 24)) is not module) == is_fused


def test_a_convolution_with_computed_weights_stays() -> None:
    g = StemBuilder()
    weight = g.call("weight", _aten.neg.default, g.constant("w", g.normal(40, 3, 3, 3)))
    module = g.module(g.bits(g.call("conv", _aten.conv2d.default, g.x, weight)))
    assert fused(module, (3, 8, 8)) is module


def test_a_convolution_with_nothing_to_fuse_stays() -> None:
    g = StemBuilder()
    module = g.module(g.conv(g.x))
    assert fused(module, (3, 8, 8)) is module


def test_a_pool_with_ceil_mode_stays_behind_the_stem() -> None:
    g = StemBuilder()
    clamp = g.call("clamp", _aten.relu.default, g.conv(g.x))
    pool = g.call("pool", _aten.max_pool2d.default, clamp, [3], [2], [0], [1], True)
    module = g.module(g.bits(pool))
    result = fused(module, (3, 8, 8))
    assert operators(result) == ["stem", "max_pool2d", "binarize"]
    x = images(2, 3, 8, 8)
    assert_bits_agree(result(x)[0], module(x)[0], 40, 1e-3)


def test_a_value_that_is_needed_before_the_clamp_is_kept() -> None:
    g = StemBuilder()
    conv = g.conv(g.x)
    clamp = g.call("clamp", _aten.relu.default, conv)
    module = g.module(conv, g.bits(clamp))
    assert fused(module, (3, 8, 8)) is module


# -- classifiers ----------------------------------------------------------------------------------


def pooled(form: str, dtype: torch.dtype = torch.float32, size: int = 4) -> fx.GraphModule:
    """A mean, what is between, and a linear layer of 33 features."""
    g = GraphBuilder(5)
    x = g.input("x")
    if "avg_pool2d" in form:
        x = g.call("mean", _aten.avg_pool2d.default, x, [size, size])
    elif "adaptive" in form:
        x = g.call("mean", _aten._adaptive_avg_pool2d.default, x, [1, 1])
    else:
        x = g.call("mean", _aten.mean.dim, x, [-1, -2], "keepdim" in form)
    if "affine" in form:
        flat = x.target is _aten.mean.dim and "keepdim" not in form
        scale = g.constant("scale", g.normal(*((33,) if flat else (33, 1, 1))).to(dtype))
        x = g.call("scaled", _aten.mul.Tensor, x, scale)
        x = g.call("moved", _aten.sub.Tensor, x, 0.25)
    if "squeeze" in form:
        x = g.call("flat", _aten.squeeze.dims, x, [2, 3])
    elif "reshape" in form:
        x = g.call("flat", _aten.reshape.default, x, [-1, 33])
    weight = g.constant("fc.weight", g.normal(10, 33).to(dtype))
    bias = None if "no bias" in form else g.constant("fc.bias", g.normal(10).to(dtype))
    return g.module(g.call("fc", _aten.linear.default, x, weight, bias))


POOLED = (
    "mean",
    "mean keepdim reshape",
    "mean keepdim squeeze",
    "mean reshape",
    "avg_pool2d reshape",
    "adaptive reshape no bias",
    "mean affine",
    "avg_pool2d affine reshape",
    "adaptive affine squeeze no bias",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", POOLED)
def test_a_mean_and_the_linear_layer_behind_it_are_fused(form: str, dtype: torch.dtype) -> None:
    module = pooled(form, dtype)
    result = fused(module, (33, 4, 4), dtype=dtype)
    assert operators(result) == ["pooled_linear"]
    x = images(5, 33, 4, 4).to(dtype)
    came, wanted = result(x)[0], module(x)[0]
    assert came.dtype == dtype
    # 33 products below 16 and their roundings, of the mean, its affine function and the sum.
    assert bool(((came - wanted).abs() <= 33 * 4 * torch.finfo(dtype).eps).all())


def test_weights_that_nothing_changes_are_shared() -> None:
    module = pooled("mean")
    result = fused(module, (33, 4, 4))
    own = {tensor.data_ptr() for tensor in module.buffers()}
    assert {tensor.data_ptr() for tensor in result.buffers()} == own


def test_a_window_that_is_not_the_whole_map_stays() -> None:
    module = pooled("avg_pool2d reshape", size=4)
    assert fused(module, (33, 5, 5)) is module


def test_a_mean_over_one_axis_stays() -> None:
    g = GraphBuilder()
    mean = g.call("mean", _aten.mean.dim, g.input("x"), [2])
    weight = g.constant("w", g.normal(10, 5))
    module = g.module(g.call("fc", _aten.linear.default, mean, weight))
    assert fused(module, (33, 5, 5)) is module


def test_a_mean_that_something_else_uses_stays() -> None:
    g = GraphBuilder()
    mean = g.call("mean", _aten.mean.dim, g.input("x"), [2, 3])
    weight = g.constant("w", g.normal(10, 33))
    module = g.module(g.call("fc", _aten.linear.default, mean, weight), mean)
    assert fused(module, (33, 5, 5)) is module


def test_infinite_limits_are_no_limits_in_effect() -> None:
    g = StemBuilder()
    clamp = g.call("clamp", _aten.hardtanh.default, g.conv(g.x), -1.0, math.inf)
    given = options(fused(g.module(g.bits(clamp)), (3, 8, 8)), "stem_bits")
    assert (given["clamp_min"], given["clamp_max"]) == (-1.0, None)
